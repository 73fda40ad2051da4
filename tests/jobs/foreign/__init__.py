"""Real checkpoints of other programs on several ranks, each with the live weights that were gathered when it was written.

models.py    tiny models, and what every case shares
zero.py      DeepSpeed: stages 0 to 3, bf16, frozen and tied weights, experts, offloading
fsdp.py      torch FSDP 1 and 2 and DCP: layouts of Accelerate, torchtitan, torch's tutorials; names of the Hub; LoRA
peft_zero.py PEFT under DeepSpeed
trainer.py   transformers.Trainer
__main__.py  makes them all, merges each and writes the table in docs/merge.md
"""
