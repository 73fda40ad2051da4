"""The model: built without weights, changed for speed and memory, filled with weights."""
