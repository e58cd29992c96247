"""Showing it: tables, plots, a progress bar, and text that may hold anything."""
