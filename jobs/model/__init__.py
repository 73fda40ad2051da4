"""Builds the model on the meta device, changes it for speed and memory, and fills in its weights.

May import conf, jobs.distributed, jobs.tokenization, jobs.data and jobs.tensor_io.
"""
