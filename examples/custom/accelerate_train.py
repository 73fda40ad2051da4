"""A plain Accelerate program: its own loop, saved with save_state, resumed with load_state. parallel=... says how it shards.

python launch.py cluster=slurm pipeline=custom parallel=zero3 custom.launcher=accelerate \
    custom.command="examples/custom/accelerate_train.py --model NAME"
"""

import argparse
import os
import shutil
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from muster import beat, stop_requested

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-every", type=int, default=20)
parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
options = parser.parse_args()
checkpoints = Path(os.environ.get("MUSTER_CHECKPOINTS", "checkpoints"))

timeout = timedelta(seconds=int(os.environ.get("MUSTER_NCCL_TIMEOUT", "1800")))
backend = "nccl" if torch.cuda.is_available() else "gloo"  # without GPUs, DeepSpeed has to be told
handlers = [InitProcessGroupKwargs(backend, timeout=timeout)]
accelerator = Accelerator(gradient_accumulation_steps=options.accumulate, kwargs_handlers=handlers)
if accelerator.is_main_process:
    shutil.rmtree(checkpoints / ".unfinished", ignore_errors=True)  # left by a kill
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(0)
rows = DataLoader(torch.randint(model.config.vocab_size, (4096, 64), generator=generator), batch_size=4)
model, optimizer, rows = accelerator.prepare(model, optimizer, rows)

step = 0
if saved := sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:])):
    accelerator.load_state(str(saved[-1]))
    step = int(saved[-1].name[11:])
    accelerator.print(f"resumed at step {step}", flush=True)


def save() -> None:
    """Write to a temporary folder, and rename it: a kill never leaves half a checkpoint under a checkpoint's name."""
    beat(step, "save")
    unfinished = checkpoints / ".unfinished"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(checkpoints / f"checkpoint-{step}")
    accelerator.wait_for_everyone()


for tokens in accelerator.skip_first_batches(rows, step * options.accumulate):
    if accelerator.sync_gradients and (step == options.steps or stop_requested()):
        break
    with accelerator.accumulate(model):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)  # under DeepSpeed, ACCELERATE_GRADIENT_CLIPPING counts
        optimizer.step()
        optimizer.zero_grad()
    if not accelerator.sync_gradients:  # more batches of this step follow
        continue
    step += 1
    beat(step)
    accelerator.print(f"step {step} loss {loss.item():.4f}", flush=True)
    if step % options.save_every == 0:
        save()
if step % options.save_every:
    save()
accelerator.end_training()
