"""Runs all checks of `muster doctor`, and writes them as text that may be shown to others."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from conf.choices import Executor
from conf.schema import Config
from launcher.check.local_gpus import local_gpus
from launcher.check.observe import hub_cache, hub_home
from launcher.doctor import machine, services, site, training
from launcher.doctor.check import Check, Level
from launcher.run_folder.record import user_name
from launcher.secret_names import known_values, masked

MARKS = {Level.green: ("green", "ok     "), Level.yellow: ("yellow", "warning"), Level.red: ("red", "ERROR  ")}
"""Colour and word of each level."""
MARK_WIDTH, NAME_WIDTH = 7, 27


def checks(config: Config) -> Iterator[Check]:
    """Look at everything, for runs on the cluster of `config`."""
    cluster = config.cluster
    folders = {
        "run folders": Path(config.run_dir).absolute().parent,
        "scratch": Path(os.path.expandvars(cluster.scratch)),
    }
    folders["Hub's cache"] = hub_cache(config)
    yield from machine.checks(folders)
    needs_slurm = cluster.executor is Executor.slurm
    yield from site.checks(cluster, user_name(os.getuid()), needed=needs_slurm)
    packages: dict[str, str] = {}
    if cluster.container.image is not None:
        yield Check(
            "training", "container", f"{cluster.container.image}: what is in it is seen by --cluster on a node only"
        )
    else:
        python = cluster.python or sys.executable
        found = training.ask(python)
        packages = {} if isinstance(found, str) else found["packages"]
        yield from training.checks(python, found, local_gpus())
    yield from services.hub(os.environ, hub_home(config), hub_cache(config), offline=cluster.offline)
    if packages:
        yield from services.trackers(os.environ, packages)


def shown(text: str) -> str:
    """Return a text without secrets, and without the user's home and name, which the readers of an issue need not know."""
    home, name = str(Path.home()), user_name(os.getuid())
    text = masked(text, known_values(os.environ))
    text = text.replace(home, "~") if home != "/" else text
    return text.replace(f"/{name}/", "/$USER/") if name else text


def lines(check: Check) -> Iterator[str]:
    """Yield the line of a check, and that of its remedy."""
    yield f"{MARKS[check.level][1]}  {f'{check.topic}: {check.name}':<{NAME_WIDTH}}  {check.found}"
    if check.remedy:
        yield f"{'':{MARK_WIDTH}}  {'':{NAME_WIDTH}}  -> {check.remedy}"
