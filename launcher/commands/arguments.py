"""Arguments that several commands have."""

import argparse
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
