"""Merges the shards of a checkpoint into one Hugging Face folder, as a stream of byte ranges. It may import every folder of jobs.

weight_names.py      names in training -> names in a model folder: wrappers, tied weights, adapters, fused weights
merge.py             which tensors the result has, and what each is made of
plan.py              files, headers and offsets of the result, before any weight is read (pure)
estimate.py          bytes, memory and time of a plan
workers.py           threads that read, cast, add adapters and write
lora.py              what an adapter adds to a block of base weights; base weights in NF4
output_folder.py     the folder of the result: finished files are kept over a restart, read back, published
rank_coordinator.py  several processes that write one result
execute.py           carries a plan out with the last four
in_memory.py         models that cannot be streamed
model_card.py        config, tokenizer, model card
external.py          the command line for checkpoints of other programs
"""
