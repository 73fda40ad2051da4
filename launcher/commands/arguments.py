"""Arguments that several commands have."""

import argparse
from pathlib import Path


def add_run(parser: argparse.ArgumentParser) -> None:
    """The first argument: a run's folder."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Settings that change, after the run."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, as for `run`")


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print everything that is known, for scripts")
