"""Check this machine, the packages, Slurm, the Hub and trackers. With --cluster, also a compute node. Exits with 1 on an error."""

import argparse
import json
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from launcher.paths import CLONE
from launcher.status import terminal

if TYPE_CHECKING:
    from conf.schema import Config
    from launcher.doctor.check import Check


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        help="check with the settings of conf/cluster/NAME.yaml; on Slurm, also submit a preflight of one node",
    )
    parser.add_argument("--no-submit", action="store_true", help="with --cluster: submit nothing")
    parser.add_argument("--json", action="store_true", help="print the checks for scripts")


def execute(options: argparse.Namespace) -> int:
    from conf.choices import Executor  # these import Hydra; --help starts faster without
    from launcher.doctor import examine
    from launcher.doctor.check import Level

    config = _config(options.cluster or "local")
    found = []
    for check in examine.checks(config):
        found.append(replace(check, found=examine.shown(check.found)))
        if not options.json:  # at once: the packages take a while to import
            _show(found[-1])
    if options.json:
        print(json.dumps([asdict(check) for check in found], indent=2))
    code = int(any(check.level is Level.red for check in found))
    if code or options.no_submit or options.cluster is None or config.cluster.executor is not Executor.slurm:
        return code
    return _submit(options)


def _config(cluster: str) -> "Config":
    """Return the config of a run on this cluster. Raises ConfigError if there is no such cluster."""
    import launch  # imports Hydra
    from conf.errors import ConfigError
    from conf.resolve import resolve
    from launcher.check import command_line

    words = [f"cluster={cluster}"]
    if problems := command_line.problems(words, CLONE / "conf"):
        raise ConfigError(*problems)
    return resolve(launch.compose(words)[0])


def _show(check: "Check") -> None:
    from launcher.doctor import examine

    for line in examine.lines(check):
        terminal.say(line, examine.MARKS[check.level][0], until=examine.MARK_WIDTH)


def _submit(options: argparse.Namespace) -> int:
    """Submit the preflight of one node, which measures its GPUs, its network and its disks."""
    import launch

    run = f"runs/doctor-{options.cluster}-{time.strftime('%Y%m%d-%H%M%S')}"
    words = [f"cluster={options.cluster}", "model=tiny", "pipeline=preflight", f"run_dir={run}"]
    words += ["cluster.gpus=null", "cluster.train.nodes=1", "cluster.train.time_min=10"]
    print("\na compute node", flush=True)
    code = launch.main(words, prog=f"{options.prog} doctor")
    if code == 0:
        print(f"its result   muster wait {run} && muster logs {run} --job preflight")
    return code
