"""Samples from a trained model."""
