"""A plain torch.distributed program with FSDP2, for custom.launcher=torchrun or srun: trains, saves with DCP, resumes, stops.

python launch.py cluster=slurm pipeline=custom custom.launcher=torchrun custom.command="examples/custom/torch_train.py --model NAME"
"""

import argparse
import os
import shutil
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from muster import beat, stop_requested

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-every", type=int, default=20)
options = parser.parse_args()
checkpoints = Path(os.environ.get("MUSTER_CHECKPOINTS", "checkpoints"))

on_gpu = torch.cuda.is_available()
timeout = timedelta(seconds=int(os.environ.get("MUSTER_NCCL_TIMEOUT", "1800")))
dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
if dist.get_rank() == 0:
    shutil.rmtree(checkpoints / ".unfinished", ignore_errors=True)  # left by a kill
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

step = 0
if saved := sorted(checkpoints.glob("step-*"), key=lambda path: int(path.name[5:])):
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=saved[-1])
    model.load_state_dict(state["model"])
    step = int(saved[-1].name[5:])
    print(f"resumed at step {step}", flush=True)


def save() -> None:
    """Write to a temporary folder, and rename it: a kill never leaves half a checkpoint under a checkpoint's name."""
    beat(step, "save")
    unfinished = checkpoints / ".unfinished"
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        unfinished.rename(checkpoints / f"step-{step}")
    dist.barrier()


while step < options.steps and not stop_requested():
    rows = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    tokens = torch.randint(model.config.vocab_size, (4, 64), generator=rows).to(device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    beat(step)
    if dist.get_rank() == 0:
        print(f"step {step} loss {loss.item():.4f}", flush=True)
    if step % options.save_every == 0:
        save()
if step % options.save_every:
    save()
dist.destroy_process_group()
