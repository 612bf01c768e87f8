"""How good a model is: knows models and samples, and no trainer."""
