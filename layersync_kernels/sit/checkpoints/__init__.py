"""Weights in files: those of a run, and published ones."""
