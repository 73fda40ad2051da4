"""Times the start-up from safetensors to the first step: Muster (each rank reads its slices), Accelerate (rank 0 broadcasts).

    python benchmarks/startup.py [--model llama8b] [--gpus N] [--folder DIR]

Both train the same random model with FSDP2, bf16 and AdamW. The page cache is emptied before. Measured are:
- s: seconds from the start of the ranks' launcher until the first step is done, with imports and compilation.
- reading: the time that Muster's progress bar shows for reading alone.
- read_gb: bytes that the ranks of this node read from its disk (read_bytes of /proc/PID/io).
- host_gb: peak over time of the ranks' anonymous and shared memory together; a shared page counts once.
- copies: host_gb in copies of the model. With `--model tiny`, it is the memory of torch, CUDA and the compiler.
Without GPUs, a tiny model is trained on CPUs to try the benchmark itself.
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
SAMPLE_EVERY_S = 0.3
"""A sample of the memory is expensive: the kernel walks through all pages."""


class Sampler:
    """Samples the host memory of a process with its descendants, and the bytes that they have read."""

    def __init__(self) -> None:
        self.peak = 0
        self.read_bytes: dict[int, int] = {}

    def sample(self, pid: int) -> None:
        self.peak = max(self.peak, sum(self._sample_one(pid) for pid in runs.descendants(pid)))

    def _sample_one(self, pid: int) -> int:
        with suppress(OSError):  # the process has ended meanwhile
            counters = dict(line.split(":") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            self.read_bytes[pid] = int(counters["read_bytes"])
        return runs.proportional(pid, "Pss_Anon:", "Pss_Shmem:")

    def result(self) -> dict[str, Any]:
        return {"read_gb": round(sum(self.read_bytes.values()) / 1e9, 2), "host_gb": round(self.peak / 1e9, 2)}


def muster(folder: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Start Muster with the model in `folder`."""
    rows = runs.write_rows(scratch / "rows.jsonl", runs.architecture(options.model)["vocab_size"], [LENGTH] * 64)
    begin = scratch / "run/jobs/train/attempt-1/begin.json"
    sampler = Sampler()

    def has_a_step(run: runs.Run) -> bool:
        """Whether the first step is done. Also samples the memory once the train job has started."""
        if begin.exists():
            sampler.sample(run.pid)
            time.sleep(SAMPLE_EVERY_S)
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
        has_a_step,
        600,
    ) as run:  # fmt: skip
        first, log = run.steps()[0], run.text()
    seconds = first["time"] - json.loads(begin.read_text())["started"]
    rates = re.findall(r"100%.*\[([\d:]+)<", log)
    return {"s": round(seconds, 1), "first_step_s": first["seconds"], "reading": rates[-1:], **sampler.result()}


def accelerate(folder: Path, options: argparse.Namespace, _: Path) -> dict[str, Any]:
    """Start Accelerate's FSDP2 with the model in `folder`."""
    fsdp = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_SYNC_MODULE_STATES": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }  # fmt: skip
    began, sampler = time.time(), Sampler()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.gpus}", __file__,
        "--accelerate-rank", str(folder),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | fsdp, cwd=ROOT) as started:
            while started.poll() is None:
                sampler.sample(started.pid)
                time.sleep(SAMPLE_EVERY_S)
        log.seek(0)
        text = log.read()
    if started.returncode:
        raise RuntimeError(text[-2000:])
    line = next(line for line in text.splitlines() if line.startswith("STEP "))
    return {"s": round(float(line.split()[1]) - began, 1), **sampler.result()}


def accelerate_rank(folder: str) -> None:
    """One rank of Accelerate: load, take one step, print the time."""
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
    parser.add_argument("--folder", type=Path, help="where to write the model")
    parser.add_argument("--accelerate-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.accelerate_rank:
        accelerate_rank(options.accelerate_rank)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="startup-") as scratch:
        folder = Path(scratch) / "model"
        size = runs.write_model(folder, options.model)
        results: dict[str, Any] = {}
        sides = {"accelerate": accelerate, "muster": muster}
        for name, start in sides.items():
            cold(folder)
            try:
                results[name] = start(folder, options, Path(scratch))
                results[name]["copies"] = round(results[name]["host_gb"] * 1e9 / size, 2)
            except RuntimeError as error:
                results[name] = {"error": str(error)}
            print(name, json.dumps(results[name]), flush=True)
    theirs, ours = (results[name].get("s") for name in sides)
    ratio = round(theirs / ours, 2) if theirs and ours else None
    print("RESULT", json.dumps({"ratio": ratio, "gpus": options.gpus, "model_gb": round(size / 1e9, 2), **results}))


if __name__ == "__main__":
    main()
