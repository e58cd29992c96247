"""Batches, and the position in them."""
