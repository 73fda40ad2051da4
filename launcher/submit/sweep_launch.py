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
    found = _configs(combinations, compose)
    configs, is_named = [config for config, _ in found], found[0][1]
    folder = Path(configs[0].run_dir if is_named else names.free(sweep_words.folder(configs)))
    if folder.exists() and any(folder.iterdir()):
        raise RunError(Problem("run_dir", folder, f"already exists. Choose another, or type muster resume {folder}"))
    for item, config in zip(combinations, configs, strict=True):
        tracker = config.tracker
        if tracker.wandb or tracker.mlflow or tracker.comet:
            tracker.group = tracker.group or folder.name
        config.data.cache = config.data.cache or str(folder.parent / ".data")  # shared with the runs beside the sweep
        config.run_dir = str(folder / item.name)
    return _start(folder, combinations, configs, given, is_new=True, is_named=is_named)


def resume(folder: Path, given: Sequence[str], compose: Compose) -> int:
    """Start what has not completed of a sweep. Raises UserError with the problems of all runs."""
    others = [word for word in given if not word.startswith("resume=")]
    runs = [Combination(run.name, {}, [f"resume={run}", *others]) for run in sweep_record.runs(folder)]
    configs = [config for config, _ in _configs(runs, compose)]
    return _start(folder, runs, configs, given, is_new=False, is_named=True)


def _configs(runs: Sequence[Combination], compose: Compose) -> list[tuple[Config, bool]]:
    """The configs of all runs of a sweep, for this machine, and whether the user has named the folder.

    Raises ConfigError with what is wrong in any of them.
    """

    def config(item: Combination) -> tuple[Config, bool]:
        [composed] = compose(item.words)
        return planned_run.config_of(composed, item.words), names.is_named(composed)

    return sweep_words.for_each(runs, config)


def _start(
    folder: Path,
    combinations: Sequence[Combination],
    configs: Sequence[Config],
    given: Sequence[str],
    *,
    is_new: bool,
    is_named: bool,
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
    if not is_named:
        folder = Path(names.reserve(str(folder)))
        for run in runs:
            run.config.run_dir = str(folder / run.folder.name)
    values = {item.name: item.values for item in combinations} if is_new else {}
    return sweep.start(folder, runs, values, [sys.argv[0], *given])
