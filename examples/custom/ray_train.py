"""Ray Train with PyTorch, for custom.launcher=ray: data parallel workers, saved and resumed through Ray Train's checkpoints.

python launch.py cluster=slurm pipeline=custom parallel=ddp custom.launcher=ray \
    custom.command="examples/custom/ray_train.py --model NAME"
"""

import argparse
import os
import tempfile
from pathlib import Path

import ray
import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from transformers import AutoModelForCausalLM

from muster import beat, stop_requested

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-every", type=int, default=20)


def work(options: argparse.Namespace) -> None:
    """Train on one worker. Ray Train calls this on each, with torch.distributed initialized."""
    rank, ranks = train.get_context().get_world_rank(), train.get_context().get_world_size()
    checkpoint = train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else tempfile.TemporaryDirectory() as folder:
        saved = torch.load(f"{folder}/training.pt") if checkpoint else None
        source = folder if checkpoint else options.model
        bare = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = prepare_model(bare)  # on its device, in DistributedDataParallel
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = 0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        print(f"resumed at step {step}", flush=True)

    def save(loss: float) -> None:
        """All workers report; the first brings the checkpoint. Ray Train copies it to MUSTER_CHECKPOINTS."""
        beat(step, "save")
        with tempfile.TemporaryDirectory() as new:
            if rank == 0:
                bare.save_pretrained(new)
                torch.save({"step": step, "optimizer": optimizer.state_dict()}, f"{new}/training.pt")
            checkpoint = train.Checkpoint.from_directory(new) if rank == 0 else None
            train.report({"step": step, "loss": loss}, checkpoint, checkpoint_dir_name=f"checkpoint-{step}")

    while step < options.steps:
        rows = torch.Generator().manual_seed(step * ranks + rank)
        tokens = torch.randint(bare.config.vocab_size, (4, 64), generator=rows).to(get_device())
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        beat(step)
        print(f"step {step} loss {loss.item():.4f}", flush=True)
        stop = stop_requested()
        if stop or step % options.save_every == 0 or step == options.steps:
            save(loss.item())
        if stop:
            break


if __name__ == "__main__":
    ray.init()  # RAY_ADDRESS names the Ray of this job
    checkpoints = Path(os.environ["MUSTER_CHECKPOINTS"])
    on_gpus = ray.cluster_resources().get("GPU", 0) > 0
    trainer = TorchTrainer(
        work,
        train_loop_config=parser.parse_args(),
        torch_config=TorchConfig(
            "nccl" if on_gpus else "gloo", timeout_s=int(os.environ.get("MUSTER_NCCL_TIMEOUT", "1800"))
        ),
        scaling_config=train.ScalingConfig(num_workers=int(os.environ["MUSTER_RANKS"]), use_gpu=on_gpus),
        run_config=train.RunConfig(name=checkpoints.name, storage_path=str(checkpoints.parent)),
    )
    trainer.fit()
