"""Launches a run: composes the config groups, checks them, plans the jobs, then prints (dry_run=true) or submits them.

`python launch.py KEY=VALUE...` and `muster run KEY=VALUE...` are the same.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.choices import Executor
from conf.errors import ConfigError, UserError
from conf.resolve import resolve
from conf.schema import Config
from conf.visible import visible
from launcher import plan, slurm
from launcher.check import (
    cluster_wide,
    command_line,
    help_text,
    local_gpus,
    localize,
    model_rules,
    observe,
    quoting,
    resume,
    rules,
    search_path,
    yaml_files,
)
from launcher.convert import experiment_file
from launcher.estimate import auto_settings
from launcher.paths import CLONE
from launcher.run_folder import names, record
from launcher.submit import preview, rewind, submit

ConfigStore.instance().store(name="schema", node=Config)


CONF = str(CLONE / "conf")
WAIT_S = 300.0
"""How long a launch waits in all for a Slurm that is busy."""

_composed: list[DictConfig] = []


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def hydra_command_line(config: DictConfig) -> None:
    """Only store what Hydra composed: Hydra prints an error that is raised in here twice. With -m it calls this per config."""
    _composed.append(config)


def compose(words: Sequence[str]) -> list[DictConfig]:
    """The configs that the command line asks for: one, several with -m, none if Hydra only printed something (--help, --cfg job).

    hydra.main composes every config twice: the first time only to learn whether there are several. That takes as long as
    everything else in a dry run. So it is called only for Hydra's own flags and for keys of `hydra`.
    """
    if any(word.lstrip("+~").startswith(("-", "hydra")) and not word.startswith(search_path.KEY) for word in words):
        hydra_command_line()
        return _composed
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONF):
        config = hydra.compose("config", overrides=list(words), return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # for interpolations of ${hydra:...}
    with open_dict(config):
        del config["hydra"]
    return [config]


def launch(composed: DictConfig, suffix: str = "") -> int:
    """Resolve, check, plan, then preview or submit one run. Raises UserError for what the user can fix."""
    config = resolve(composed)
    config.run_dir += suffix
    if not config.resume:
        cluster_wide.apply(config, sys.argv[1:])
    localize.localize(config, local_gpus.usable())
    if config.resume:
        config = resume.resumed_config(config, sys.argv[1:])
        cluster_wide.apply(config, sys.argv[1:])
    elif names.is_named(sys.argv[1:]):
        config.run_dir = resume.stored_path(Path(config.run_dir))
    else:
        config.run_dir = names.free(config.run_dir)
    plan.add_push(config)
    facts = observe.observe(config)
    if problems := rules.problems(config, facts):
        raise ConfigError(*problems)
    config, chosen = auto_settings.choose(config)
    if facts.existing:
        resume.require_same(facts.existing, config)
    for line in (*_announcement(config, facts, chosen), *rewind.notes(facts.existing, config)):
        print(line, flush=True)
    jobs = plan.plan(config, done=resume.completed_jobs(config))
    if config.dry_run:
        print(visible(preview.text(config, jobs)), flush=True)
        return 0
    if jobs and not names.is_named(sys.argv[1:]):
        config.run_dir = names.reserve(config.run_dir)
    return submit.submit(config, jobs, command=sys.argv)


def _announcement(config: Config, facts: observe.Facts, chosen: Sequence[str]) -> Iterator[str]:
    """The lines before the summary: the device, what the checks have to say, and variables that the jobs do not get."""
    if "train" in config.jobs and config.cluster.executor is Executor.local:
        yield f"device    {local_gpus.described(config.cluster.train.gpus_per_node or 0)}"
    yield from facts.hub.notes
    if "train" in config.jobs:
        yield from (*model_rules.notes(config, facts.model), *chosen)
    if not plan.runs_here(config):
        yield from preview.ignored_variables(os.environ)


def _launch_all(words: list[str], folders: Sequence[Path]) -> int:
    """Launch every run that the words of a command line ask for. `folders` hold groups beside Muster's. Returns the exit code."""
    given, experiments = experiment_file.register(words)
    words, entries = quoting.read_words(given)
    if problems := command_line.problems(words, CLONE / "conf", [path.stem for path in experiments], folders):
        raise ConfigError(*problems)
    sys.argv[1:] = command_line.in_hydras_order(command_line.allow_new_entries(words))
    try:
        configs = compose(sys.argv[1:])
    except (hydra.errors.HydraException, OmegaConfBaseException, YAMLError) as error:
        if problems := yaml_files.problems(words, [CLONE / "conf", *folders], experiments):
            raise ConfigError(*problems) from error
        raise
    for line in command_line.notes(given) if configs else ():
        print(line, flush=True)
    # recorded in run.json, with the entries that Hydra cannot take
    sys.argv[1:] = command_line.allow_new_entries(given)
    for config in configs:
        quoting.apply(config, entries)
    suffixes = [f"-{number}" for number, _ in enumerate(configs)] if len(configs) > 1 else [""]
    with slurm.retrying(WAIT_S):
        return max((launch(*each) for each in zip(configs, suffixes, strict=False)), default=0)


def main(arguments: Sequence[str] | None = None, prog: str = "launch.py") -> int:
    """Launch what the arguments (default: those of the process) ask for; messages begin with `prog`. Returns the exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise, so that every message below is ours
    if arguments is not None:
        sys.argv = [prog, *arguments]  # Hydra reads sys.argv, and run.json records it
    _composed.clear()
    try:
        words, folders = search_path.read(sys.argv[1:])
        if (keys := help_text.asked(words)) is not None:
            command = "python launch.py" if prog == "launch.py" else prog
            print(help_text.text(keys, [CLONE / "conf", *folders], command))
            return 0
        # Hydra's completion reads it, also when no shell has set it, and does not know the word `run`
        os.environ["COMP_LINE"] = os.environ.get("COMP_LINE", f"{prog} ").replace("muster run ", "muster ", 1)
        return _launch_all(words, folders)
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except (hydra.errors.HydraException, OmegaConfBaseException, YAMLError) as error:
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
