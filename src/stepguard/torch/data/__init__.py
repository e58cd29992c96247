"""Batches from loaders, and the position in the data."""
