"""The compute precision that a run has settled on: `train.precision`, or what training made of `auto` on its GPUs."""

from pathlib import Path

from conf.choices import Precision
from conf.errors import Problem, RunError
from conf.files import read_json
from conf.schema import Config

LOWEST_CAPABILITY = {"bf16": (8, 0), "fp16": (5, 3), "tf32": (8, 0), "float8": (8, 9)}
"""Lowest CUDA compute capability with such arithmetic: Ampere; the second Maxwell; Ampere; Ada."""


def has(capability: tuple[int, int] | None, kind: str) -> bool:
    """Whether a GPU of this CUDA compute capability computes in `kind`. None, for a device of another sort, computes in all."""
    return capability is None or capability >= LOWEST_CAPABILITY.get(kind, (0, 0))


def record(config: Config) -> Path:
    """RUN/precision.json, which preflight or train writes for `auto`."""
    return Path(config.run_dir) / "precision.json"


def recorded(config: Config) -> Precision | None:
    """What `auto` became in this run; None if no rank has seen its GPU yet."""
    stored = read_json(record(config))
    return Precision[stored["precision"]] if stored else None


def settled(config: Config) -> Precision:
    """The precision that training computed in. Raises RunError if `auto` was never replaced."""
    if config.train.precision is not Precision.auto:
        return config.train.precision
    if (found := recorded(config)) is None:
        message = (
            f'{record(config)} is missing, which says what training made of it. Write {{"precision": "bf16"}} into it'
        )
        raise RunError(Problem("train.precision", "auto", f"{message}, or fp16 or fp32"))
    return found
