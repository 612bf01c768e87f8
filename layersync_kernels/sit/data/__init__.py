"""Training data, shuffled the same way on every machine.

A data set answers three questions: its sample shape (C, H, W), its number of classes, and "give me batches from
position p of the shuffled stream". The stream is a function of the seed alone: a resumed run needs no iterator state.
"""
