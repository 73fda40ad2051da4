"""Looks at the world the checks need to know: files, GPUs, commands and the run folder; decides nothing."""

import glob
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf import resolve
from conf.datasets import training_paths
from conf.schema import Config

FIRST_ROW_CHARACTERS = 2**20
"""How much of a file is read to see its columns: the file may be huge, and this is a login node."""
FILES = {".json", ".jsonl", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".gz", ".bz2", ".xz"}
SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol")


@dataclass(frozen=True)
class FirstRow:
    """What was seen of a training set: its first row's columns, where that could be read here, or why it could not."""

    key: str
    """Of the set's path in the config."""
    columns: tuple[str, ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Facts:
    """What was seen on the login node when the command was given."""

    gpus: int = 0
    """GPUs of this machine, within CUDA_VISIBLE_DEVICES."""
    slurm_missing: tuple[str, ...] = ()
    """Slurm commands that are not on PATH."""
    files_missing: tuple[tuple[str, str], ...] = ()
    """(key, value) of paths in the config at which there is nothing."""
    first_rows: tuple["FirstRow", ...] = ()
    """Of each training set."""
    existing: Config | None = None
    """The config that `run_dir` already holds."""
    run_dir_error: str | None = None
    """Why `run_dir` cannot be used."""
    secrets_missing: tuple[str, ...] = field(default=())
    """Names in `cluster.secrets` found neither in the environment nor in `cluster.secrets_file`."""


def observe(config: Config) -> Facts:
    """Look at everything the checks ask about. `localise` must have run."""
    facts = Facts(gpus=local_gpus(), files_missing=tuple(_missing_files(config)))
    try:
        existing, run_dir_error = _run_dir(Path(config.run_dir))
    except OSError as error:
        existing, run_dir_error = None, f"cannot be used: {error.strerror}"
    return replace(
        facts,
        first_rows=tuple(FirstRow(key, *_first_row(Path(path))) for key, path in training_paths(config.data)),
        existing=existing,
        run_dir_error=run_dir_error,
        slurm_missing=tuple(name for name in SLURM_COMMANDS if shutil.which(name) is None),
        secrets_missing=tuple(_missing_secrets(config)),
    )


def local_gpus() -> int:
    """GPUs that a process started here would see; counted from device files, because torch is never imported here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    if not Path("/proc/driver/nvidia/version").exists():
        found = 0
    return found if visible is None else min(found, len([item for item in visible.split(",") if item.strip()]))


def local_memory_gib() -> float | None:
    """Memory of the smallest GPU here, in GiB, less a two-hundredth that the driver keeps; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(math.floor(0.995 * int(line) / 1024) for line in said.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def looks_like_file(value: str) -> bool:
    """Whether a value means a path and not a Hub id (`owner/name`)."""
    return value.startswith(("/", ".", "~")) or bool(set(Path(value).suffixes) & FILES)


def _missing_files(config: Config) -> Iterator[tuple[str, str]]:
    named = {
        **dict(training_paths(config.data)),
        "data.validation_path": config.data.validation_path,
        "model.source": config.model.source,
        "model.tokenizer": config.model.tokenizer,
    }
    if "generate" in config.jobs:
        named["generate.prompts"] = config.generate.prompts
    for key, value in named.items():
        if value and (looks_like_file(value) or key == "generate.prompts") and not _matches(value):
            yield key, value


def _matches(value: str) -> bool:
    """Whether there is a file or folder at a path, or one that fits a pattern."""
    return bool(Path(value).exists() or glob.glob(str(Path(value).expanduser()), recursive=True))


def _first_row(path: Path) -> tuple[tuple[str, ...] | None, str | None]:
    """Columns of the first row of a JSON or JSONL file, or why there are none; (None, None) for what is no such file."""
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return None, None
    text = ""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:  # later rows are the gates' to judge
            text = file.read(FIRST_ROW_CHARACTERS).lstrip().removeprefix("[").lstrip()
        row = json.JSONDecoder().raw_decode(text)[0] if text and text != "]" else None
    except (json.JSONDecodeError, RecursionError) as error:
        if len(text) > FIRST_ROW_CHARACTERS // 2:
            return None, None  # a row too long to judge from here
        return None, f"the first row is not valid JSON ({error})"
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    if not isinstance(row, dict):
        return None, "has no rows" if row is None else "the first row is not an object with named columns"
    return tuple(row), None


def _run_dir(folder: Path) -> tuple[Config | None, str | None]:
    if (folder / "config.yaml").exists():
        return resolve.load(folder / "config.yaml"), None
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        return None, "is there already and is not a run; choose another run_dir"
    parent = next(item for item in (folder, *folder.parents) if item.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        return None, f"{parent} is not a folder you can write to; choose another run_dir"
    return None, None


def _missing_secrets(config: Config) -> Iterator[str]:
    path = Path(config.cluster.secrets_file).expanduser()
    written = path.read_text(encoding="utf-8") if path.is_file() else ""
    names = {line.split("=", 1)[0].strip() for line in written.splitlines()}
    yield from (name for name in config.cluster.secrets if name not in os.environ and name not in names)
