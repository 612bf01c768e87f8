"""How good a model is: knows models, transports and samples, and no trainer."""
