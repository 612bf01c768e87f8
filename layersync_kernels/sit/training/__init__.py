"""The trainer: knows no metric."""
