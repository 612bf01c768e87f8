"""What samples stand for: how they become pictures, sounds and films that a person can judge.

A modality knows what `restore` needs, normalisation included, and is written into the checkpoints of a run: whoever
draws from a run needs nothing of its data.
"""
