"""Launches or continues a sweep: composes and checks all of its runs, then previews or starts them."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from conf.errors import ConfigError, Problem, RunError
from conf.schema import Config
from conf.visible import visible
from launcher.check import command_line, sweep_rules, sweep_words
from launcher.check.sweep_words import Combination
from launcher.run_folder import names, sweep_record
from launcher.submit import planned_run, sweep

Compose = Callable[[list[str]], list[DictConfig]]
"""Checks the words of one run, and composes its config. Raises ConfigError."""


def launch(given: Sequence[str], compose: Compose) -> int:
    """Start a new sweep, or print it. Raises UserError with the problems of all runs."""
    combinations = sweep_words.combinations(given)
    configs = _configs(combinations, compose)
    folder = Path(configs[0].run_dir if names.is_named(given) else names.free(sweep_words.folder(configs)))
    if folder.exists() and any(folder.iterdir()):
        raise RunError(Problem("run_dir", folder, f"already exists. Choose another, or type muster resume {folder}"))
    for item, config in zip(combinations, configs, strict=True):
        tracker = config.tracker
        if tracker.wandb or tracker.mlflow or tracker.comet:
            tracker.group = tracker.group or folder.name
        config.data.cache = config.data.cache or str(folder.parent / ".data")  # shared with the runs beside the sweep
        config.run_dir = str(folder / item.name)
    return _start(folder, combinations, configs, given, is_new=True)


def resume(folder: Path, given: Sequence[str], compose: Compose) -> int:
    """Start what has not completed of a sweep. Raises UserError with the problems of all runs."""
    others = [word for word in given if not word.startswith("resume=")]
    runs = [Combination(run.name, {}, [f"resume={run}", *others]) for run in sweep_record.runs(folder)]
    return _start(folder, runs, _configs(runs, compose), given, is_new=False)


def _configs(runs: Sequence[Combination], compose: Compose) -> list[Config]:
    """The configs of all runs of a sweep, for this machine. Raises ConfigError with what is wrong in any of them."""

    def config(item: Combination) -> Config:
        [composed] = compose(item.words)
        return planned_run.config_of(composed, item.words)

    return sweep_words.for_each(runs, config)


def _start(
    folder: Path, combinations: Sequence[Combination], configs: Sequence[Config], given: Sequence[str], *, is_new: bool
) -> int:
    """Check the runs of a sweep on this site, then preview or start them."""
    by_name = {item.name: config for item, config in zip(combinations, configs, strict=True)}
    found = sweep_words.for_each(combinations, lambda item: planned_run.checked(by_name[item.name], item.words))
    runs = [run for run, _ in found]
    if problems := sweep_rules.across([run.config for run in runs]):
        raise ConfigError(*problems)
    notes = {item.name: own for item, (_, own) in zip(combinations, found, strict=True)}
    for line in [*command_line.notes(given), *sweep_words.of_runs(notes)]:
        print(line, flush=True)
    if runs[0].config.dry_run:
        print(visible(sweep.preview_text(folder, runs)), flush=True)
        return 0
    if is_new and not names.is_named(given):
        folder = Path(names.reserve(str(folder)))
        for run in runs:
            run.config.run_dir = str(folder / run.folder.name)
    values = {item.name: item.values for item in combinations} if is_new else {}
    return sweep.start(folder, runs, values, [sys.argv[0], *given])
