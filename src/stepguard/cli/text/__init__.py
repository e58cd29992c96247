"""Output: tables, plots, a progress bar, and escapes for text from files."""
