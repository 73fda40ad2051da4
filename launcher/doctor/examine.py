"""Runs all checks of `muster doctor`, and writes them as text that may be shown to others."""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from conf.choices import Executor
from conf.schema import Config
from conf.schema_cluster import Resources
from launcher.check.local_gpus import local_gpus
from launcher.check.observe import hub_cache, hub_home
from launcher.doctor import machine, services, site, training
from launcher.doctor.check import Check, Level, error
from launcher.run_folder.record import user_name
from launcher.secret_names import known_values, masked

MARKS = {Level.green: ("green", "ok     "), Level.yellow: ("yellow", "warning"), Level.red: ("red", "ERROR  ")}
"""Colour and word of each level."""
MARK_WIDTH, NAME_WIDTH = 7, 27


def checks(config: Config) -> Iterator[Check]:
    """Look at everything on this machine, from which runs are launched on the cluster of `config`."""
    cluster = config.cluster
    yield from machine.checks(_folders(config))
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
        for check in training.checks(python, found, local_gpus()):
            # the jobs do not run on this machine
            yield replace(check, level=Level.yellow) if needs_slurm and check.level is Level.red else check
    yield from _services(config, packages)


def of_node(config: Config, part: Resources) -> Iterator[Check]:
    """Look at a compute node from within a job with the resources `part`, where this is the Python of the jobs."""
    yield from machine.checks(_folders(config), machine.NODE_PACKAGES)
    found = training.ask(sys.executable)
    yield from training.checks(sys.executable, found, local_gpus())
    packages: dict[str, str] = {}
    if not isinstance(found, str):
        packages, asked = found["packages"], part.gpus_per_node or 0
        if len(found["gpus"]) < asked:
            remedy = "set gpus_per_node to what a node has, or gpu_type, and see cluster.setup and container"
            yield error("training", "GPUs of the job", f"torch sees {len(found['gpus'])}, asked for {asked}", remedy)
    yield from _services(config, packages)


def _folders(config: Config) -> dict[str, Path]:
    return {
        "run folders": Path(config.run_dir).absolute().parent,
        "scratch": Path(os.path.expandvars(config.cluster.scratch)),
        "Hub's cache": hub_cache(config),
    }


def _services(config: Config, packages: Mapping[str, str]) -> Iterator[Check]:
    cluster = config.cluster
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
