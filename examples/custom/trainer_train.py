"""A transformers.Trainer program, for custom.launcher=torchrun or srun. parallel=zero3 or parallel=fsdp says how it shards.

python launch.py cluster=slurm pipeline=custom parallel=zero3 custom.launcher=torchrun \
    custom.command="examples/custom/trainer_train.py --model NAME"
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from muster import trainer_callback

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-every", type=int, default=20)
parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
options = parser.parse_args()
output = os.environ.get("MUSTER_CHECKPOINTS", "checkpoints")
precision = os.environ.get("ACCELERATE_MIXED_PRECISION")  # TrainingArguments does not read it

arguments = TrainingArguments(
    output_dir=output,
    max_steps=options.steps,
    save_steps=options.save_every,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=options.accumulate,
    learning_rate=1e-3,
    logging_steps=1,
    report_to="none",
    bf16=precision == "bf16",
    fp16=precision == "fp16",
    ddp_backend=None if torch.cuda.is_available() else "gloo",  # without GPUs, DeepSpeed has to be told
    ddp_timeout=int(os.environ.get("MUSTER_NCCL_TIMEOUT", "1800")),
)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
generator = torch.Generator().manual_seed(0)
rows = [
    {"input_ids": row, "labels": row} for row in torch.randint(model.config.vocab_size, (512, 64), generator=generator)
]
trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[trainer_callback()])
trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if Path(output).is_dir() else None)
