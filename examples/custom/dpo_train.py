"""TRL's DPOTrainer on pairs of answers, for custom.launcher=torchrun, accelerate or srun. parallel=... says how it shards.

python launch.py cluster=slurm pipeline=custom parallel=zero2 custom.launcher=torchrun \
    custom.command="examples/custom/dpo_train.py --model NAME --data pairs.jsonl"
"""

import argparse
import os
from pathlib import Path

from datasets import load_dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer

from muster import trainer_callback

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model with a chat template")
parser.add_argument(
    "--data", required=True, help='JSONL file of rows {"prompt": [...], "chosen": [...], "rejected": [...]}'
)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-every", type=int, default=20)
options = parser.parse_args()
output = os.environ.get("MUSTER_CHECKPOINTS", "checkpoints")

trainer = DPOTrainer(
    model=options.model,
    args=DPOConfig(
        output_dir=output,
        max_steps=options.steps,
        save_steps=options.save_every,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        max_length=128,
        logging_steps=1,
        report_to="none",
        bf16=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        ddp_timeout=int(os.environ.get("MUSTER_NCCL_TIMEOUT", "1800")),
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    callbacks=[trainer_callback()],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if Path(output).is_dir() else None)
