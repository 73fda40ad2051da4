"""Checkpoints of a run: saved in the background, published whole, checked, kept, resumed in any layout."""
