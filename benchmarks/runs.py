"""Shared by the training benchmarks: random rows, tokenizers and models, and a Muster run that ends once it has been measured."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launcher.run_folder import attempts, record  # noqa: E402


def architecture(model: str) -> dict[str, Any]:
    """`architecture` of conf/model/MODEL.yaml."""
    group: dict[str, Any] = yaml.safe_load((ROOT / f"conf/model/{model}.yaml").read_text(encoding="utf-8"))
    fields: dict[str, Any] = group["architecture"]
    return fields


def shape(model: str) -> Any:
    """The LlamaConfig of conf/model/MODEL.yaml. Muster trains the same model."""
    from transformers import LlamaConfig

    fields = architecture(model)
    config = LlamaConfig(**fields.pop("extra", {}), **fields, use_cache=False)
    config._attn_implementation = "sdpa"
    return config


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Write a tokenizer of this size, for machines that do not have the model's own. Returns the folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocab_size)}, unk_token="w0"))
    special = {"unk_token": "w0", "eos_token": "w1", "pad_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def write_rows(path: Path, vocab_size: int, lengths: list[int]) -> Path:
    """Write JSONL with one row of random tokens per length. The last token is the end token. Returns the path."""
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            file.write(json.dumps({"input_ids": [*random.integers(3, vocab_size, length - 1).tolist(), 1]}) + "\n")
    return path


def chat_lengths(longest: int, tokens: int) -> list[int]:
    """Row lengths like those of chats: log-normal around longest / 12, until they add up to `tokens`."""
    random, lengths = np.random.default_rng(1), list[int]()
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(random.lognormal(np.log(longest / 12), 1.0), 16, longest)))
    return lengths


def write_model(folder: Path, model: str, dtype: str = "bfloat16") -> int:
    """Write a Hugging Face folder with random weights in `dtype`, with many processes. Returns the bytes of the weights."""
    import torch
    from transformers import LlamaForCausalLM

    config = shape(model)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).named_parameters()}
    write_tokenizer(folder, config.vocab_size)
    config.save_pretrained(folder)
    names = list(shapes)
    parts = [{name: shapes[name] for name in names[at : at + 20]} for at in range(0, len(names), 20)]
    files = [folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    workers = min(len(parts), os.cpu_count() or 1, 24)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write_file, files, parts, range(len(parts)), repeat(dtype)))
    index = {name: file.name for part, file in zip(parts, files, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return int(getattr(torch, dtype).itemsize) * sum(prod(shape) for shape in shapes.values())


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], number: int, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    gpus = torch.cuda.device_count()
    device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
    torch.manual_seed(number)
    weights = {
        name: torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(0.02).to(getattr(torch, dtype)).cpu()
        for name, shape in shapes.items()
    }
    save_file(weights, path, {"format": "pt"})


class Run:
    """A Muster run that is under way: its folder, the log of launch.py, and its process id."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.pid = 0

    def steps(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl for the training steps done so far."""
        return [line for line in attempts.metrics(self.folder) if "loss" in line]

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")


@contextmanager
def muster(
    folder: Path,
    overrides: list[str],
    is_done: Callable[[Run], bool],
    limit_s: float,
    environment: dict[str, str] | None = None,
) -> Iterator[Run]:
    """Start launch.py with `overrides`, wait until `is_done`, and yield the run. Then kill it: its checkpoint is not needed.

    Raises RuntimeError with the end of the log if the run ends earlier or takes longer than `limit_s`.
    """
    run = Run(folder, folder.with_suffix(".log"))
    command = [sys.executable, str(ROOT / "launch.py"), *overrides]
    with run.log.open("w") as out:
        started = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env=os.environ | (environment or {})
        )
    run.pid = started.pid
    slurm = any(override.startswith("cluster=slurm") for override in overrides)
    try:
        deadline = time.monotonic() + limit_s
        while not is_done(run):
            # on Slurm launch.py ends once it has submitted
            ended = started.poll() is not None and not (slurm and started.returncode == 0)
            if ended and is_done(run):  # it may have written its last steps since the last look
                break
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"{folder.name}, {len(run.steps())} steps: {run.text()[-6000:]}")
            time.sleep(0.05)
        yield run
    finally:
        if slurm and (folder / "run.json").exists() and (job := record.newest_jobs(folder).get("train")):
            subprocess.run(["scancel", "--signal=KILL", "--full", job[0]], check=False)
            while subprocess.run(["squeue", "--noheader", "--job", job[0]], capture_output=True, check=False).stdout:
                time.sleep(0.5)
        _kill(started)


def _kill(started: subprocess.Popen[bytes]) -> None:
    """Kill launch.py and its descendants; killing the session is not enough: submitit's controller and the ranks have their own.

    Returns once their memory is free, that of GPUs too: unpinning a hundred gigabytes takes a while.
    """
    pids = descendants(started.pid)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    started.wait()
    while any(_holds_memory(pid) for pid in pids):
        time.sleep(0.1)
    time.sleep(1)


def _holds_memory(pid: int) -> bool:
    """Whether a killed process still has its memory. It does not if it is gone, or a zombie without other threads."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except OSError:
        return False


def resident(pid: int, *kinds: str) -> int:
    """Sum of these lines of /proc/PID/status in bytes, for example `VmRSS:`. 0 if the process is gone."""
    return _sum(f"/proc/{pid}/status", kinds)


def proportional(pid: int, *kinds: str) -> int:
    """The same for /proc/PID/smaps_rollup, which divides a shared page among the processes that share it."""
    return _sum(f"/proc/{pid}/smaps_rollup", kinds)


def _sum(path: str, kinds: tuple[str, ...]) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(kinds))


def descendants(pid: int) -> set[int]:
    """A process, its children, their children, and so on."""
    parents = dict(_parents())
    pids = {pid}
    while more := {child for child, parent in parents.items() if parent in pids} - pids:
        pids |= more
    return pids


def _parents() -> Iterator[tuple[int, int]]:
    """(process id, parent's process id) of all processes."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                yield int(path.name), int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
