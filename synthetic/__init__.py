"""Data sets that are drawn, with nothing to download."""
