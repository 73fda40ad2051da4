"""From safetensors to the first step: Muster, whose ranks each read their own slices, beside Accelerate's broadcast from rank 0.

    python benchmarks/startup.py [--model llama8b] [--gpus N] [--folder DIR]

Both train with FSDP2, bf16 and AdamW on the same random model, out of the page cache. Seconds run from the start of the ranks'
launcher until the first step is done, imports and compilation included; `reading` is what Muster's bar says of it alone.
Bytes are what the ranks of this node asked of its disk (read_bytes of /proc/PID/io), host memory is the peak over time of their
anonymous and shared pages together, a page that several have counted once, and `copies` that peak in copies of the model: what
`--model tiny` takes is no model's but torch's, CUDA's and the compiler's. Without GPUs it rehearses itself at a tiny size.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import runs  # noqa: E402
from benchmarks.consolidate import cold  # noqa: E402

LENGTH = 2048
EVERY_S = 0.3
"""Between two looks at the memory, each of which walks through all pages."""


class Sampler:
    """Host memory of a process and all below it, and what they have read."""

    def __init__(self) -> None:
        self.peak = 0
        self.read: dict[int, int] = {}

    def look(self, pid: int) -> None:
        self.peak = max(self.peak, sum(self._one(pid) for pid in runs.below(pid)))

    def _one(self, pid: int) -> int:
        with suppress(OSError):
            said = dict(line.split(":") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            self.read[pid] = int(said["read_bytes"])
        return runs.proportional(pid, "Pss_Anon:", "Pss_Shmem:")

    def found(self) -> dict[str, Any]:
        return {"read_gb": round(sum(self.read.values()) / 1e9, 2), "host_gb": round(self.peak / 1e9, 2)}


def muster(folder: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    rows = runs.write_rows(scratch / "rows.jsonl", runs.architecture(options.model)["vocab_size"], [LENGTH] * 64)
    train = scratch / "run/jobs/train/attempt-1/begin.json"
    sampler = Sampler()

    def sampled(run: runs.Run) -> bool:
        """The memory of its processes, while they train; until there is a step."""
        if train.exists():
            sampler.look(run.pid)
            time.sleep(EVERY_S)
        return bool(run.steps())

    with runs.muster(
        scratch / "run",
        [
            f"run_dir={scratch / 'run'}",
            f"model={options.model}", "model.init=pretrained", f"model.source={folder}", "pipeline=train", "parallel=fsdp",
            "data=jsonl", f"data.path={rows}", f"data.max_length={LENGTH}", "cluster=local", "train.save_every=0",
            f"cluster.train.ranks_per_node={options.gpus}", f"train.global_batch={options.gpus}", "train.steps=20",
            "train.micro_batch=1", "train.eval_every=0", "data.validation_fraction=0.02",
        ],
        sampled,
        600,
    ) as run:  # fmt: skip
        first, log = run.steps()[0], run.text()
    seconds = first["time"] - json.loads(train.read_text())["started"]
    rates = re.findall(r"100%.*\[([\d:]+)<", log)
    return {"s": round(seconds, 1), "first_step_s": first["seconds"], "reading": rates[-1:], **sampler.found()}


def accelerate(folder: Path, options: argparse.Namespace, _: Path) -> dict[str, Any]:
    fsdp = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_SYNC_MODULE_STATES": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }  # fmt: skip
    began, sampler = time.time(), Sampler()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.gpus}", __file__,
        "--side", str(folder),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | fsdp, cwd=ROOT) as started:
            while started.poll() is None:
                sampler.look(started.pid)
                time.sleep(EVERY_S)
        log.seek(0)
        said = log.read()
    if started.returncode:
        raise RuntimeError(said[-2000:])
    line = next(line for line in said.splitlines() if line.startswith("STEP "))
    return {"s": round(float(line.split()[1]) - began, 1), **sampler.found()}


def side(folder: str) -> None:
    """Accelerate's way, in a rank."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = torch.randint(3, model.config.vocab_size, (1, LENGTH), device=accelerator.device)
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    if accelerator.is_main_process:
        print(f"STEP {time.time():.3f}", flush=True)
    accelerator.end_training()


def main() -> None:
    import torch

    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama8b" if gpus else "tiny", help="a file of conf/model")
    parser.add_argument("--gpus", type=int, default=gpus or 2)
    parser.add_argument("--folder", type=Path, help="where the model is written")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options.side)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="startup-") as scratch:
        folder = Path(scratch) / "model"
        size = runs.write_model(folder, options.model)
        found: dict[str, Any] = {}
        sides = {"accelerate": accelerate, "muster": muster}
        for name, one in sides.items():
            cold(folder)
            try:
                found[name] = one(folder, options, Path(scratch))
                found[name]["copies"] = round(found[name]["host_gb"] * 1e9 / size, 2)
            except RuntimeError as error:
                found[name] = {"error": str(error)}
            print(name, json.dumps(found[name]), flush=True)
    theirs, ours = (found[name].get("s") for name in sides)
    ratio = round(theirs / ours, 2) if theirs and ours else None
    print("RESULT", json.dumps({"ratio": ratio, "gpus": options.gpus, "model_gb": round(size / 1e9, 2), **found}))


if __name__ == "__main__":
    main()
