"""Arguments that several commands have."""

import argparse
import math
from pathlib import Path


def add_run(parser: argparse.ArgumentParser, by_id: bool = False) -> None:
    """The first argument: a run's folder, or with `by_id` also the id of one of its jobs."""
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN_OR_ID if by_id else "the run's folder")
    parser.set_defaults(by_id=by_id)


RUN_OR_ID = "the run's folder, or the Slurm id of one of its jobs"


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Settings that change, after the run."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, as for `run`")


def add_json(parser: argparse._ActionsContainer) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print everything that is known, for scripts")


def add_every(parser: argparse._ActionsContainer, when: str = "") -> None:
    """--every: seconds between two questions to Slurm. `when`: what it is for, before the rest of its help."""
    text = f"{when}how often to ask Slurm; default: 10"
    parser.add_argument("--every", type=_seconds, default=10.0, metavar="SECONDS", help=text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
