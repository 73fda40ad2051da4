"""The one command: composes the config groups, checks, plans, then prints (dry_run=true) or submits every job of a run."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError, UserError
from conf.resolve import resolve
from conf.schema import Config
from launcher import plan
from launcher.check import command_line, localize, observe, resume, rules
from launcher.estimate import auto_settings
from launcher.submit import preview, submit

ConfigStore.instance().store(name="schema", node=Config)


_composed: list[DictConfig] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def compose(config: DictConfig) -> None:
    """Only keep what Hydra composed: an error raised in here would be printed twice. With -m there are several."""
    _composed.append(config)


def launch(composed: DictConfig, suffix: str = "") -> int:
    """Resolve, check, plan, then preview or submit one run. Raises UserError for what the user can mend."""
    config = resolve(composed)
    config.run_dir += suffix
    localize.localize(config, observe.local_gpus())
    if config.resume:
        config = resume.resumed_config(config, sys.argv[1:])
    seen = observe.observe(config)
    if problems := rules.problems(config, seen):
        raise ConfigError(*problems)
    config, chosen = auto_settings.choose(config)
    if seen.existing:
        resume.require_same(seen.existing, config)
    for line in chosen if "train" in config.jobs else ():
        print(line, flush=True)
    jobs = plan.plan(config, done=resume.completed_jobs(config))
    if config.dry_run:
        print(preview.text(config, jobs), flush=True)
        return 0
    return submit.submit(config, jobs, command=sys.argv)


def main() -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise, so that every message below is ours
    try:
        if problems := command_line.problems(sys.argv[1:], Path(__file__).parent / "conf"):
            raise ConfigError(*problems)
        sys.argv[1:] = command_line.allow_new_entries(sys.argv[1:])
        compose()
        suffixes = [f"-{number}" for number, _ in enumerate(_composed)] if len(_composed) > 1 else [""]
        return max((launch(*each) for each in zip(_composed, suffixes, strict=False)), default=0)
    except UserError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return error.exit_code
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        causes = [str(item).splitlines()[0] for item in (error, error.__cause__) if item]
        print(f"launch.py: {': '.join(causes)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... dry_run=true | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("launch.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
