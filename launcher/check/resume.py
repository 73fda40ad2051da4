"""Continues a run: its own config, with the few things that may change while a run lives."""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from conf import resolve
from conf.errors import Problem, RunError
from conf.schema import Config
from launcher.run_folder.attempts import last_verdict
from launcher.run_folder.status import COMPLETED

CHANGEABLE = (
    "cluster",
    "parallel",
    "jobs",
    "pipeline",
    "consolidate",
    "generate",
    "tracker",
    "resume",
    "dry_run",
    "submit",
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.async_save",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.compile",
    "train.fingerprint",
    "train.max_loss_rise",
    "train.profile",
    "train.profile_ranks",
)
"""What a resumed run may be given anew: where and how long it runs, never what is computed."""


def continued(composed: Config, words: list[str]) -> Config:
    """The config stored in `composed.resume`, with what the command line changes of it.

    Raises RunError for a folder that is no run, and for every change that would make it another run.
    """
    folder = Path(str(composed.resume)).resolve()
    if not (folder / "config.yaml").exists():
        raise RunError(Problem("resume", composed.resume, "is no run folder: it has no config.yaml"))
    config = resolve.load(folder / "config.yaml")
    given = [
        word.lstrip("+").split("=", 1)[0] for word in words if "=" in word and not word.startswith(("-", "hydra."))
    ]
    fixed = [key for key in given if not any(key == item or key.startswith(f"{item}.") for item in CHANGEABLE)]
    if fixed:
        raise RunError(
            *(
                Problem(
                    key,
                    None,
                    "cannot change in a run; start a new one (model.source=RUN/model begins from this one's weights)",
                )
                for key in fixed
            )
        )
    for key in sorted(given):
        _copy(composed, config, "jobs" if key == "pipeline" else key)
    config.run_dir, config.resume = str(folder), str(folder)
    return config


def require_same(stored: Config, asked: Config) -> None:
    """Raise RunError when `run_dir` holds a run of another config, naming what differs; `resume=` has made it the same."""
    if asked.resume:
        return
    before, now = _flat(stored), _flat(asked)
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    differing.sort(key=lambda key: (key.count("."), key))  # the name of a model before the numbers of its shape
    if differing:
        shown = ", ".join(f"{key}={before.get(key)} (now {now.get(key)})" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise RunError(
            Problem(
                "run_dir",
                asked.run_dir,
                f"holds a run with {shown}{more}; "
                f"take another run_dir, or continue that one with resume={asked.run_dir}",
            )
        )


def completed(config: Config) -> set[str]:
    """Jobs of the run whose newest attempt completed under this very config."""
    jobs = Path(config.run_dir) / "jobs"
    verdicts = {name: last_verdict(jobs / name) for name in config.jobs if (jobs / name).is_dir()}
    digest = resolve.digest(config)
    return {
        name
        for name, verdict in verdicts.items()
        if verdict and verdict["status"] == COMPLETED and verdict.get("config") == digest
    }


def _copy(source: Any, target: Any, key: str) -> None:
    """Set a dotted key of `target` to what it is in `source`; inside a free-form dictionary the whole of it is copied."""
    name, _, rest = key.partition(".")
    if rest and is_dataclass(getattr(source, name)):
        _copy(getattr(source, name), getattr(target, name), rest)
    else:
        setattr(target, name, getattr(source, name))


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(section).items():
        if is_dataclass(value):
            found |= _flat(value, f"{prefix}{name}.")
        elif prefix or name not in resolve.LAUNCH_ONLY:
            found[prefix + name] = value
    return found
