"""Finds tensors in files (safetensors, torch's DCP, DeepSpeed) and reads any range of them, for loading, resuming and merging.
It may import jobs.distributed and conf; only slices.py imports torch at its top, because ranks start and small merges end sooner
without it."""
