"""Finds tensors in files (safetensors, torch's DCP, DeepSpeed) and reads any range of them, for loading, resuming and merging.

May import conf and jobs.distributed. Only slices.py imports torch at its top: without torch, ranks
start sooner and small merges end sooner.
"""
