"""Check this machine, the packages, Slurm, the Hub and trackers. With --cluster, also compute nodes. Exits with 1 on an error."""

import argparse
import json
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conf.visible import visible
from launcher import slurm
from launcher.status import terminal

if TYPE_CHECKING:
    from conf.schema import Config
    from launcher.doctor.check import Check, Level
    from launcher.doctor.nodes import Place


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        help="check with the settings of conf/cluster/NAME.yaml; on Slurm, also on a compute node of each kind that jobs ask for",
    )
    parser.add_argument("--no-submit", action="store_true", help="with --cluster: submit nothing")
    parser.add_argument("--json", action="store_true", help="print the checks for scripts")


def execute(options: argparse.Namespace) -> int:
    from conf.choices import Executor  # these import Hydra; --help starts faster without
    from launcher.doctor import examine
    from launcher.doctor.check import Level
    from launcher.doctor.nodes import Place

    config = _config(options.cluster or "local")
    looks_at_nodes = not options.no_submit and options.cluster is not None and config.cluster.executor is Executor.slurm
    here = Place("login node" if looks_at_nodes else "here")
    if looks_at_nodes:
        print("looking at this machine ...", file=sys.stderr, flush=True)
    for check in examine.checks(config):
        here.checks.append(replace(check, found=examine.shown(check.found)))
        if not (options.json or looks_at_nodes):  # at once: the packages take a while to import
            _show(here.checks[-1])
    is_red = any(check.level is Level.red for check in here.checks)
    places, code = [here], int(is_red)
    if looks_at_nodes and not is_red:
        nodes, code = _look_at_nodes(options)
        places += nodes
        code = code or int(any(check.level is Level.red for place in nodes for check in place.checks))
    if options.json:
        print(
            json.dumps([asdict(check) | {"place": place.name} for place in places for check in place.checks], indent=2)
        )
    elif len(places) > 1:
        _show_side_by_side(places)
    elif looks_at_nodes:
        for check in here.checks:
            _show(check)
    return code


def _config(cluster: str) -> "Config":
    """Return the config of a run on this cluster. Raises ConfigError if there is no such cluster."""
    import launch  # imports Hydra
    from conf.resolve import resolve
    from launcher.check import search_path

    words, folders = search_path.read([f"cluster={cluster}"])  # also ~/.config/muster/conf
    return resolve(launch.read(words, folders, [])[0])


def _show(check: "Check") -> None:
    from launcher.doctor import examine

    for line in examine.lines(check):
        _print(line, check.level)


def _show_side_by_side(places: "list[Place]") -> None:
    from launcher.doctor import examine, nodes

    for line, level in nodes.side_by_side(places, examine.MARKS):
        _print(line, level)


def _print(line: str, level: "Level") -> None:
    from rich.text import Text

    from launcher.doctor import examine

    if (screen := terminal.console()).is_terminal:
        text = Text(visible(line))
        for marked, (color, word) in examine.MARKS.items():
            if marked is level:
                text.highlight_words([word.strip()], color)
        screen.print(text, soft_wrap=True)
    else:
        print(visible(line), flush=True)


def _look_at_nodes(options: argparse.Namespace) -> "tuple[list[Place], int]":
    """Check a compute node of each kind, and let the preflight measure all GPUs of one. Returns (what was found, exit code)."""
    import launch
    from conf import resolve
    from launcher.doctor import examine, nodes
    from launcher.status import requests

    run = Path(f"runs/doctor-{options.cluster}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    words = [f"cluster={options.cluster}", "model=tiny", "pipeline=preflight", f"run_dir={run}"]
    words += ["cluster.gpus=null", "cluster.train.nodes=1", f"cluster.train.time_min={nodes.TIME_MIN}"]
    with redirect_stdout(sys.stderr):  # what is printed is to be pasted into an issue
        if code := launch.main(words, prog=f"{options.prog} doctor"):
            return [], code
    submitted: list[nodes.Node] = []
    try:
        nodes.submit(resolve.load(run / "config.yaml"), run, submitted)
        nodes.wait(submitted, run)
    except slurm.SlurmError as problem:
        nodes.cancel(submitted)
        requests.cancel(run)
        print(visible(f"{options.prog} doctor: a compute node cannot be checked: {problem}"), file=sys.stderr)
        return [], 2
    except KeyboardInterrupt:  # nobody waits for them any more
        nodes.cancel(submitted)
        requests.cancel(run)
        raise
    places = nodes.results(submitted, run)
    for place in places:
        place.checks = [
            replace(check, found=examine.shown(check.found), remedy=examine.shown(check.remedy))
            for check in place.checks
        ]
    return places, 0
