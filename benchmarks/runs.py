"""What benchmarks of training share: rows, a tokenizer for any vocabulary, and a run that is ended when it has shown enough."""

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
    found: dict[str, Any] = yaml.safe_load((ROOT / f"conf/model/{model}.yaml").read_text(encoding="utf-8"))
    return found["architecture"]


def shape(model: str) -> Any:
    """The LlamaConfig of `conf/model/MODEL.yaml`, which is also what Muster trains."""
    from transformers import LlamaConfig

    found = architecture(model)
    config = LlamaConfig(**found.pop("extra", {}), **found, use_cache=False)
    config._attn_implementation = "sdpa"
    return config


def write_tokenizer(folder: Path, words: int) -> Path:
    """A tokenizer with as many words as the model has rows, for a machine without the model's own."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w1", pad_token="w2").save_pretrained(
        folder
    )
    return folder


def write_rows(path: Path, words: int, lengths: list[int]) -> Path:
    """Rows of random tokens, one of each length, as JSONL; the last token ends the text."""
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            file.write(json.dumps({"input_ids": [*random.integers(3, words, length - 1).tolist(), 1]}) + "\n")
    return path


def ragged(longest: int, tokens: int) -> list[int]:
    """Lengths as chats have them: log-normal around a twelfth of the longest, until there are so many tokens."""
    random, found = np.random.default_rng(1), []
    while sum(found) < tokens:
        found.append(int(np.clip(random.lognormal(np.log(longest / 12), 1.0), 16, longest)))
    return found


def write_model(folder: Path, model: str, dtype: str = "bfloat16") -> int:
    """A folder as the Hub has them, of random weights in `dtype`, written by many processes; returns their bytes."""
    import torch
    from transformers import LlamaForCausalLM

    config = shape(model)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        every = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).named_parameters()}
    write_tokenizer(folder, config.vocab_size)
    config.save_pretrained(folder)
    names = list(every)
    parts = [names[at : at + 20] for at in range(0, len(names), 20)]
    files = [folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    shapes = [{name: every[name] for name in part} for part in parts]
    workers = min(len(parts), os.cpu_count() or 1, 24)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write_file, files, shapes, range(len(parts)), repeat(dtype)))
    index = {name: file.name for part, file in zip(parts, files, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return getattr(torch, dtype).itemsize * sum(prod(shape) for shape in every.values())


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], number: int, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    gpus = torch.cuda.device_count()
    device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
    torch.manual_seed(number)
    made = {
        name: torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(0.02).to(getattr(torch, dtype)).cpu()
        for name, shape in shapes.items()
    }
    save_file(made, path, {"format": "pt"})


class Run:
    """A run folder that something writes to."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.pid = 0

    def steps(self) -> list[dict[str, Any]]:
        """The steps so far."""
        return [line for line in attempts.metrics(self.folder) if "loss" in line]

    def text(self) -> str:
        """Of its log so far."""
        return self.log.read_text(errors="replace")


@contextmanager
def muster(
    folder: Path,
    words: list[str],
    enough: Callable[[Run], bool],
    limit_s: float,
    environment: dict[str, str] | None = None,
) -> Iterator[Run]:
    """Start launch.py with `words`, wait until it has shown `enough`, and end it: what it would save is of no use here.

    Raises RuntimeError with the log's end where it ends before, or takes longer than `limit_s`.
    """
    run = Run(folder, folder.with_suffix(".log"))
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    with run.log.open("w") as out:
        started = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env=os.environ | (environment or {})
        )
    run.pid = started.pid
    slurm = any(word.startswith("cluster=slurm") for word in words)
    try:
        until = time.monotonic() + limit_s
        while not enough(run):
            over = started.poll() is not None and not (slurm and started.returncode == 0)
            if over and enough(run):
                break
            if over or time.monotonic() > until:
                raise RuntimeError(f"{folder.name}, {len(run.steps())} steps: {run.text()[-2000:]}")
            time.sleep(0.05)
        yield run
    finally:
        if slurm and (folder / "run.json").exists() and (job := record.newest_jobs(folder).get("train")):
            subprocess.run(["scancel", "--signal=KILL", "--full", job[0]], check=False)
            while subprocess.run(["squeue", "--noheader", "--job", job[0]], capture_output=True, check=False).stdout:
                time.sleep(0.5)
        _kill(started)


def _kill(started: subprocess.Popen[bytes]) -> None:
    """With all that it has started: submitit's controller and the ranks begin sessions of their own. Returns once all have
    gone, and the memory of GPUs with them: to unpin a hundred gigabytes takes a while."""
    every = below(started.pid)
    for pid in every:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    started.wait()
    while any(_holds_memory(pid) for pid in every):
        time.sleep(0.1)
    time.sleep(1)


def _holds_memory(pid: int) -> bool:
    """Whether a process that was killed is still on its way: it is gone, or nothing of it but its exit status is left."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except OSError:
        return False


def resident(pid: int, *kinds: str) -> int:
    """Bytes of memory of a process, of these lines of its status together; 0 where it has gone."""
    return _sum(f"/proc/{pid}/status", kinds)


def proportional(pid: int, *kinds: str) -> int:
    """Likewise of its smaps_rollup, where each of the processes that share a page has a part of it."""
    return _sum(f"/proc/{pid}/smaps_rollup", kinds)


def _sum(path: str, kinds: tuple[str, ...]) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(kinds))


def below(pid: int) -> set[int]:
    """A process and all that it, and those, have started."""
    parents = dict(_parents())
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                yield int(path.name), int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
