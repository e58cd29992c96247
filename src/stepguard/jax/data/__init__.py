"""Loaders of all kinds, and the position in them."""
