"""Builds the config of a resumed run: the stored one, with the few keys that may change in a run."""

import shutil
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from conf import resolve, sweep
from conf.choices import Init
from conf.errors import Problem, RunError, as_typed
from conf.jobs import BEFORE_TRAINING, JOB_KINDS, RESUMABLE
from conf.schema import Config
from launcher.check import adapter_source, command_line, localize
from launcher.run_folder.attempts import last_verdict, metrics, newest_attempt
from launcher.run_folder.status import COMPLETED

CHANGEABLE = (
    "cluster",
    "parallel",
    "jobs",
    "pipeline",
    "consolidate",
    "custom",
    "generate",
    "hub",
    "tracker",
    "resume",
    "sweep",
    "dry_run",
    "submit",
    "train.steps",
    "train.epochs",
    "train.learning_rate",
    "train.resume_step",
    "train.log_every",
    "train.eval_every",
    "train.evals_per_epoch",
    "train.save_every",
    "train.saves_per_epoch",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.early_stopping",
    "train.async_save",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.reentrant_checkpointing",
    "train.compile",
    "train.fingerprint",
    "train.max_loss_rise",
    "train.profile",
    "train.profile_ranks",
)
"""Keys that may change when a run is resumed: where it runs, how long and at which learning rate, never what it computes else."""
OF_THE_FOLDER = ("run_dir", "name", "experiment")
"""Keys that never change in a run. An experiment sets many keys, so each must be typed."""
MADE_BEFORE_TRAINING = ("data", "metrics.jsonl", "precision.json", "adapter_init.safetensors")
"""Files and folders of a run that may be made from keys that change before it trains."""
STORED_AS = {"pipeline": "jobs", "parallel.deepspeed_config": "parallel.deepspeed"}
"""Keys whose meaning is stored under another one."""


def resumed_config(composed: Config, words: list[str]) -> Config:
    """The config stored in the run folder `composed.resume`, with the values that the command line changes.

    `words` are the command line; `composed` holds the values they have. Before the first step of training, any key may change.
    Raises RunError for a folder that is not a run, and for every override that may not change in a run.
    """
    folder = Path(stored_path(Path(str(composed.resume)).resolve()))
    if not (folder / "config.yaml").exists():
        message = "is not a run folder: it has no config.yaml. Use the run_dir of an earlier run"
        raise RunError(Problem("resume", composed.resume, message))
    config = resolve.load(folder / "config.yaml")
    overridden = command_line.keys(words)
    fixed = [key for key in overridden if not _may_change(key)]
    if fixed and has_trained(folder):
        message = (
            "cannot change in a run that has trained. Start a new run; "
            "to begin from this run's weights, add model.source=RUN/model"
        )
        raise RunError(*(Problem(key, None, message) for key in fixed))
    if fixed := [key for key in overridden if key in OF_THE_FOLDER]:
        message = "cannot change when a run is resumed. Start a new run, or type the keys that should change"
        raise RunError(*(Problem(key, None, message) for key in fixed))
    had_adapter = config.adapter.source is not None
    for key in sorted(overridden):  # sorted, so that a group (cluster=...) is copied before the keys inside it
        _copy(composed, config, STORED_AS.get(key, key))
    config.run_dir, config.resume = str(folder), str(folder)
    # what `localize` reads from the files of a model or adapter is stored, and was that of the one before
    if config.model.init is Init.pretrained and {"model.source", "model.revision"} & set(overridden):
        config.model.architecture = localize.architecture(config)
    if "adapter.source" in overridden:
        if had_adapter:
            adapter_source.forget_settings(config, overridden)
        if config.adapter.source:
            adapter_source.take_settings(config)
    return config


def _may_change(key: str) -> bool:
    return any(key == item or key.startswith(f"{item}.") for item in CHANGEABLE)


def has_trained(run: Path) -> bool:
    """Whether a step was trained, or a checkpoint was saved, in this run."""
    try:
        saved = any((run / "checkpoints").iterdir())
    except OSError:
        saved = False
    return saved or any(line.get("step", 0) > 0 for line in metrics(run))


def remove_what_changed(stored: Config, config: Config) -> list[str]:
    """Delete what a run has made from other values than those of `config`, so that its jobs make it again.

    `stored` is the config with which the run was started. Returns the names of what was deleted. A run that has trained keeps all.
    """
    run, before, now = Path(config.run_dir), _flat(stored), _flat(config)
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    if has_trained(run) or all(_may_change(key) or key in OF_THE_FOLDER for key in changed):
        return []
    there = [name for name in MADE_BEFORE_TRAINING if (run / name).exists()]
    for name in there:
        if (run / name).is_dir() and not (run / name).is_symlink():
            shutil.rmtree(run / name)
        else:
            (run / name).unlink()
    return there


def forget_comparison(stored: Config, config: Config) -> None:
    """Delete the loss that a run of a sweep was compared by (`sweep.stop_worst`), if it will now be compared at another step.

    The other runs would compare theirs, at the new step, with one of the old step.
    """

    def step_of(values: Config) -> tuple[object, ...]:
        rule = values.sweep.stop_worst
        return (values.train.steps, values.train.epochs, sweep.stop_worst(rule).at if rule else None)

    is_moved = config.sweep.stop_worst is not None and step_of(stored) != step_of(config)
    if is_moved or config.train.resume_step is not None:
        (Path(config.run_dir) / sweep.RUNG).unlink(missing_ok=True)


def stored_path(run: Path) -> str:
    """Return the path of a run folder as its first launch wrote it, if it is still the same folder; else `run`.

    A project that is reached through a symbolic link has two paths. With the other one, the run would have another config,
    so its jobs would run again, and its running jobs would not be found.
    """
    try:
        if not (run / "config.yaml").exists():
            return str(run)
        stored = resolve.load(run / "config.yaml").run_dir
        return stored if run.samefile(stored) else str(run)
    except OSError:  # the folder was moved, is closed to this user, or can have no such name
        return str(run)


def require_same(stored: Config, requested: Config) -> None:
    """Raise RunError naming what differs if `run_dir` already holds a run with another config.

    With `resume=` there is nothing to compare: `resumed_config` started from the stored config.
    """
    if requested.resume:
        return
    before, now = _flat(stored), _flat(requested)
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    differing.sort(key=lambda key: (key.count("."), key))  # the name of a model before the numbers of its shape
    if differing:
        shown = ", ".join(f"{key}={as_typed(before.get(key))} (now {as_typed(now.get(key))})" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        message = (
            f"already holds a run with {shown}{more}. "
            f"Use another run_dir, or continue that run: muster resume {requested.run_dir}"
        )
        raise RunError(Problem("run_dir", requested.run_dir, message))


def completed_jobs(config: Config) -> set[str]:
    """Names of the jobs whose newest attempt completed with exactly this config. They need not run again.

    Fetch and push ask the Hub what is there already. Training from a chosen checkpoint (`train.resume_step`) is never done.
    """
    jobs = Path(config.run_dir) / "jobs"
    verdicts = {
        name: last_verdict(jobs / name) for name in config.jobs if (jobs / name).is_dir() and not _asks_the_hub(name)
    }
    digest = resolve.digest(config)
    completed = {
        name
        for name, verdict in verdicts.items()
        if verdict and verdict["status"] == COMPLETED and verdict.get("config") == digest
        if name != "train" or config.train.resume_step is None
    }
    return completed | {name for name in _done_by_another_run(config, digest) if verdicts.get(name) is None}


def _done_by_another_run(config: Config, digest: str) -> frozenset[str]:
    """The jobs that one run of a sweep has done for others too: if this run has begun to train, they had completed."""
    run = Path(config.run_dir)
    if not (run.parent / sweep.FILE).is_file():
        return frozenset()
    has_begun = any(newest_attempt(run / "jobs" / name) for name in RESUMABLE)
    return BEFORE_TRAINING if has_begun and resolve.digest(resolve.load(run / "config.yaml")) == digest else frozenset()


def _asks_the_hub(name: str) -> bool:
    return name in JOB_KINDS and JOB_KINDS[name].needs_hub


def _copy(source: Any, target: Any, key: str) -> None:
    """Copy the value of a dotted key from `source` to `target`. A free-form dictionary is copied as a whole."""
    name, _, rest = key.partition(".")
    if rest and is_dataclass(getattr(source, name)):
        _copy(getattr(source, name), getattr(target, name), rest)
    else:
        setattr(target, name, getattr(source, name))


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, without the keys that belong to one command only."""
    values: dict[str, Any] = {}
    for name, value in vars(section).items():
        if is_dataclass(value):
            values |= _flat(value, f"{prefix}{name}.")
        elif prefix or name not in resolve.LAUNCH_ONLY:
            values[prefix + name] = value
    return values
