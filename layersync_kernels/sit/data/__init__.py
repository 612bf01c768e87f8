"""Training data, images or cached latents, shuffled the same way on every machine.

A data set answers three questions: the `SampleSpec` of its samples, its number of classes, and "give me batches from
position p of the shuffled stream". The stream is a function of the seed alone: a resumed run needs no iterator state.
"""
