"""Captions to sequences of embeddings."""
