"""Estimates memory from a config alone and chooses settings by it; may import conf only, and does no I/O."""
