"""Launches a run: composes the config groups, checks them, plans the jobs, then prints (dry_run=true) or submits them.

`python launch.py KEY=VALUE...` and `muster run KEY=VALUE...` are the same.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError, Problem, RunError, UserError
from conf.resolve import resolve
from conf.schema import Config
from conf.visible import visible
from launcher import plan, slurm
from launcher.check import (
    command_line,
    local_gpus,
    localize,
    model_rules,
    observe,
    quoting,
    resume,
    rules,
    sweep_rules,
    sweep_words,
)
from launcher.check.sweep_words import Combination
from launcher.convert import experiment_file
from launcher.estimate import auto_settings
from launcher.paths import CLONE
from launcher.run_folder import names, record, sweep_record
from launcher.submit import preview, submit
from launcher.submit import sweep as sweep_submit
from launcher.submit.sweep_run import SweepRun

ConfigStore.instance().store(name="schema", node=Config)


CONF = str(CLONE / "conf")
WAIT_S = 300.0
"""How long a launch waits in all for a Slurm that is busy."""

_composed: list[DictConfig] = []


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def hydra_command_line(config: DictConfig) -> None:
    """Only store what Hydra composed: Hydra prints an error that is raised in here twice."""
    _composed.append(config)


def compose(words: Sequence[str]) -> list[DictConfig]:
    """The config that the command line asks for, in a list; none if Hydra only printed something (--help, --cfg job).

    hydra.main composes every config twice: the first time only to learn whether there are several. That takes as long as
    everything else in a dry run. So it is called only for Hydra's own flags and for keys of `hydra`.
    """
    if any(word.lstrip("+~").startswith(("-", "hydra")) for word in words):
        _composed.clear()
        hydra_command_line()
        return [*_composed]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONF):
        config = hydra.compose("config", overrides=list(words), return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # for interpolations of ${hydra:...}
    with open_dict(config):
        del config["hydra"]
    return [config]


def launch(composed: DictConfig) -> int:
    """Resolve, check, plan, then preview or submit one run. Raises UserError for what the user can fix."""
    config = resolve(composed)
    localize.localize(config, local_gpus.local_gpus())
    if config.resume:
        config = resume.resumed_config(config, sys.argv[1:])
    elif names.is_named(sys.argv[1:]):
        config.run_dir = resume.stored_path(Path(config.run_dir))
    else:
        config.run_dir = names.free(config.run_dir)
    (config, jobs), notes = checked(config)
    for line in notes:
        print(line, flush=True)
    if config.dry_run:
        print(visible(preview.text(config, jobs)), flush=True)
        return 0
    if jobs and not names.is_named(sys.argv[1:]):
        config.run_dir = names.reserve(config.run_dir)
    return submit.submit(config, jobs, command=sys.argv)


def checked(config: Config) -> tuple[SweepRun, list[str]]:
    """The config with what is chosen for it, the jobs to start, and notes to print. Raises UserError with every problem."""
    plan.add_push(config)
    facts = observe.observe(config)
    if problems := rules.problems(config, facts):
        raise ConfigError(*problems)
    config, chosen = auto_settings.choose(config)
    if facts.existing:
        resume.require_same(facts.existing, config)
    notes = [*facts.hub.notes]
    notes += [*model_rules.notes(config, facts.model), *chosen] if "train" in config.jobs else []
    notes += [] if plan.runs_here(config) else preview.ignored_variables(os.environ)
    return SweepRun(config, plan.plan(config, done=resume.completed_jobs(config))), notes


def launch_sweep(given: Sequence[str], experiments: Sequence[str]) -> int:
    """Check all runs of a sweep, then preview or start them. Raises UserError with the problems of all runs."""
    combinations = sweep_words.combinations(given)
    configs = compose_runs(combinations, experiments)
    sweep = Path(configs[0].run_dir if names.is_named(given) else names.free(sweep_words.folder(configs)))
    if sweep.exists() and any(sweep.iterdir()):
        raise RunError(Problem("run_dir", sweep, f"already exists. Choose another, or type muster resume {sweep}"))
    for item, config in zip(combinations, configs, strict=True):
        tracker = config.tracker
        if tracker.wandb or tracker.mlflow or tracker.comet:
            tracker.group = tracker.group or sweep.name
        config.data.cache = config.data.cache or str(sweep.parent / ".data")  # shared with the runs beside the sweep
        config.run_dir = str(sweep / item.name)
    return start_sweep(sweep, combinations, configs, given, is_new=True)


def resume_sweep(sweep: Path, given: Sequence[str], experiments: Sequence[str]) -> int:
    """Start what has not completed of a sweep."""
    others = [word for word in given if not word.startswith("resume=")]
    runs = [Combination(run.name, {}, [f"resume={run}", *others]) for run in sweep_record.runs(sweep)]
    return start_sweep(sweep, runs, compose_runs(runs, experiments), given, is_new=False)


def compose_runs(runs: Sequence[Combination], experiments: Sequence[str]) -> list[Config]:
    """The configs of all runs of a sweep. Raises ConfigError with what is wrong on the command lines of all of them."""

    def check_words(item: Combination) -> None:
        words, _ = quoting.read_words(item.words)
        if found := command_line.problems(words, CLONE / "conf", experiments, in_sweep=True):
            raise ConfigError(*found)

    sweep_words.for_each(runs, check_words)
    return sweep_words.for_each(runs, compose_run)


def compose_run(item: Combination) -> Config:
    """The config of one run of a sweep, for this machine."""
    words, entries = quoting.read_words(item.words)
    sys.argv[1:] = command_line.allow_new_entries(words)
    [composed] = compose(sys.argv[1:])
    quoting.apply(composed, entries)
    config = resolve(composed)
    localize.localize(config, local_gpus.local_gpus())
    return resume.resumed_config(config, item.words) if config.resume else config


def start_sweep(
    sweep: Path, combinations: Sequence[Combination], configs: Sequence[Config], given: Sequence[str], *, is_new: bool
) -> int:
    """Check the runs of a sweep on this site, then preview or start them."""
    by_name = {item.name: config for item, config in zip(combinations, configs, strict=True)}
    found = sweep_words.for_each(combinations, lambda item: checked(by_name[item.name]))
    runs = [run for run, _ in found]
    if problems := sweep_rules.across([run.config for run in runs]):
        raise ConfigError(*problems)
    for line in dict.fromkeys([*command_line.notes(given), *(line for _, notes in found for line in notes)]):
        print(line, flush=True)
    if runs[0].config.dry_run:
        print(visible(sweep_submit.preview_text(sweep, runs)), flush=True)
        return 0
    if is_new and not names.is_named(given):
        sweep = Path(names.reserve(str(sweep)))
        for run in runs:
            run.config.run_dir = str(sweep / run.folder.name)
    values = {item.name: item.values for item in combinations} if is_new else {}
    return sweep_submit.start(sweep, runs, values, [sys.argv[0], *given])


def launch_words(arguments: Sequence[str]) -> int:
    """Launch what the words of the command line ask for: one run, or a sweep. Returns the exit code."""
    given, experiments = experiment_file.register(arguments)
    if sweep_words.is_sweep(given):
        return launch_sweep(given, experiments)
    if sweep := sweep_words.resumed(given):
        return resume_sweep(sweep, given, experiments)
    words, entries = quoting.read_words(given)
    if problems := command_line.problems(words, CLONE / "conf", experiments):
        raise ConfigError(*problems)
    sys.argv[1:] = command_line.allow_new_entries(words)
    configs = compose(sys.argv[1:])
    for line in command_line.notes(given) if configs else ():
        print(line, flush=True)
    # recorded in run.json, with the entries that Hydra cannot take
    sys.argv[1:] = command_line.allow_new_entries(given)
    for config in configs:
        quoting.apply(config, entries)
    return max(map(launch, configs), default=0)


def main(arguments: Sequence[str] | None = None, prog: str = "launch.py") -> int:
    """Launch what the arguments (default: those of the process) ask for; messages begin with `prog`. Returns the exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise, so that every message below is ours
    if arguments is not None:
        sys.argv = [prog, *arguments]  # Hydra reads sys.argv, and run.json records it
    try:
        with slurm.retrying(WAIT_S):
            return launch_words(sys.argv[1:])
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        causes = [str(item).splitlines()[0] for item in (error, error.__cause__) if item]
        print(f"{prog}: {visible(': '.join(causes))}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"{prog}: {record.closed_file(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... dry_run=true | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
