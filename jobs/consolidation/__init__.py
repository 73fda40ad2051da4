"""Sharded checkpoints to one Hugging Face folder, as a stream of byte ranges. `jobs/consolidate.py` reads top to bottom.

extents.py      where a tensor's elements lie in files; which ranges make a block of it (pure)
pickles.py      reads what torch.save and DCP pickled without running any code of theirs
dcp.py zero.py hf.py     one kind of checkpoint each: name -> Stored
names.py        the names of training to the names of a model folder: fused weights, ties, adapters
dtypes.py       what numbers are stored as; casts, by numpy or torch
adapter.py      what is added to a block of base weights
plan.py         files, headers and offsets of the result, before any weight is read (pure)
files.py        open files, and the blocks of stored tensors in them
stream.py       workers that read, cast, add, write
result.py       the folder: finished files kept over a restart, read back, published
describe.py     config, tokenizer, model card
"""
