"""Launches a run: composes the config groups, checks them, plans the jobs, then prints (dry_run=true) or submits them.

`python launch.py KEY=VALUE...` and `muster run KEY=VALUE...` are the same.
"""

import os
import sys

from launcher import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_with_a_line("launch.py")

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.errors import ConfigError, Problem, UserError
from conf.schema import Config
from conf.visible import visible
from launcher import slurm
from launcher.check import command_line, help_text, quoting, resume, search_path, sweep_words, yaml_files
from launcher.convert import experiment_file
from launcher.paths import CLONE
from launcher.run_folder import names, record
from launcher.status import terminal
from launcher.submit import planned_run, preview, submit, sweep_launch

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
    """The config that the command line asks for, in a list; none if Hydra only printed something (--cfg job).

    hydra.main composes every config twice: the first time only to learn whether there are several. That takes as long as
    everything else in a dry run. So it is called only for Hydra's own flags and for keys of `hydra`.
    """
    if any(word.lstrip("+~").startswith(("-", "hydra")) and not word.startswith(search_path.KEY) for word in words):
        _composed.clear()
        hydra_command_line()
        return [*_composed]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONF):
        config = hydra.compose("config", overrides=list(words), return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # for interpolations of ${hydra:...}
    with open_dict(config):
        del config["hydra"]
    return [config]


def read(
    given: list[str], folders: Sequence[Path], experiments: Sequence[Path], *, in_sweep: bool = False
) -> list[DictConfig]:
    """Check the words of a run, and compose what they ask for. Raises ConfigError with every problem.

    `folders` hold groups beside Muster's; `experiments` are those given by path. `in_sweep`: it is one run of a sweep.
    """
    words, entries = quoting.read_words(given)
    names_given = [path.stem for path in experiments]
    if problems := command_line.problems(words, CLONE / "conf", names_given, folders, in_sweep=in_sweep):
        raise ConfigError(*problems)
    sys.argv[1:] = command_line.in_hydras_order(command_line.allow_new_entries(words))
    try:
        configs = compose(sys.argv[1:])
    except (hydra.errors.HydraException, OmegaConfBaseException, YAMLError) as error:
        if problems := yaml_files.problems(words, [CLONE / "conf", *folders], experiments):
            raise ConfigError(*problems) from error
        raise
    if problems := yaml_files.misread(words, [CLONE / "conf", *folders], experiments):
        raise ConfigError(*problems)
    for config in configs:
        quoting.apply(config, entries)
    return configs


def launch(composed: DictConfig) -> int:
    """Resolve, check, plan, then preview or submit one run. Raises UserError for what the user can fix."""
    config = planned_run.config_of(composed, sys.argv[1:])
    named = bool(config.resume) or names.is_named(composed)
    if not config.resume:
        if named and not config.run_dir:
            raise ConfigError(
                Problem("run_dir", "", "must not be empty. Name a folder, or remove it: Muster then chooses one")
            )
        config.run_dir = resume.stored_path(Path(config.run_dir)) if named else names.free(config.run_dir)
    (config, jobs), notes = planned_run.checked(config, sys.argv[1:])
    for line in notes:
        print(line, flush=True)
    if config.dry_run:
        print(visible(preview.text(config, jobs, record.training_rows(config))), flush=True)
        return 0
    if jobs and not named:
        config.run_dir = names.reserve(config.run_dir)
    return submit.submit(config, jobs, command=sys.argv)


def launch_words(words: Sequence[str], folders: Sequence[Path]) -> int:
    """Launch what the words of a command line ask for: one run, or a sweep. Returns the exit code."""
    given, experiments = experiment_file.register(words)
    compose_run = partial(read, folders=folders, experiments=experiments, in_sweep=True)
    if sweep_words.is_sweep(given):
        return sweep_launch.launch(given, compose_run)
    if sweep := sweep_words.resumed(given):
        return sweep_launch.resume(sweep, given, compose_run)
    configs = read(given, folders, experiments)
    for line in command_line.notes(given) if configs else ():
        print(line, flush=True)
    # recorded in run.json, with the entries that Hydra cannot take
    sys.argv[1:] = command_line.allow_new_entries(given)
    return max(map(launch, configs), default=0)


def main(arguments: Sequence[str] | None = None, prog: str = "launch.py") -> int:
    """Launch what the arguments (default: those of the process) ask for; messages begin with `prog`. Returns the exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise, so that every message below is ours
    if arguments is not None:
        sys.argv = [prog, *arguments]  # Hydra reads sys.argv, and run.json records it
    try:
        ctrl_c.raises()
        words, folders = search_path.read(sys.argv[1:])
        if (keys := help_text.asked(words)) is not None:
            command = "python launch.py" if prog == "launch.py" else prog
            print(help_text.text(keys, [CLONE / "conf", *folders], command))
            return 0
        # Hydra's completion reads it, also when no shell has set it, and does not know the word `run`
        os.environ["COMP_LINE"] = os.environ.get("COMP_LINE", f"{prog} ").replace("muster run ", "muster ", 1)
        with slurm.retrying(WAIT_S):
            return launch_words(words, folders)
    except UserError as error:
        terminal.error(prog, str(error))
        return error.exit_code
    except (hydra.errors.HydraException, OmegaConfBaseException, YAMLError) as error:
        causes = [str(item).splitlines()[0] for item in (error, error.__cause__) if item]
        terminal.error(prog, ": ".join(causes))
        return 2
    except PermissionError as error:
        terminal.error(prog, record.closed_file(error))
        return 2
    except BrokenPipeError:  # `... dry_run=true | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
