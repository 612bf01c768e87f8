"""Several processes that train one model: who they are, what they tell each other, how a model is divided among them.

Nothing else touches process groups.
"""
