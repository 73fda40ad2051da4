"""Merges the shards of a checkpoint into one Hugging Face folder, as a stream of byte ranges. It may import every folder of jobs.

prefixes.py          which tensors of a checkpoint are weights, and what stands before their names
weight_names.py      names in training -> names in a model folder: tied weights, adapters, fused weights
tied_weights.py      whether a head is still tied to its embedding
quantized.py         weights that must not be cast without their scales
merge.py             which tensors the result has, and what each is made of
adapter_layers.py    what an adapter consists of, by PEFT's own model
updates.py           the adapters of a checkpoint -> what is added to each source
plan.py              files, headers and offsets of the result, before any weight is read (pure)
estimate.py          bytes, memory and time of a plan
workers.py           threads that read, cast, add adapters and write
lora.py              what an adapter adds to a block of base weights; base weights in NF4
output_folder.py     the folder of the result: finished files are kept over a restart, read back, published
rank_coordinator.py  several processes that write one result
execute.py           carries a plan out with the last four
in_memory.py         models that cannot be streamed
live_check.py        compares a merged adapter with PEFT's model
layer_check.py       compares single layers, for models larger than memory
model_card.py        config, tokenizer, model card
external.py          the command line for checkpoints of other programs
"""
