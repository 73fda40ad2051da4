"""List the runs below a folder: state, step, loss, time left."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from conf.visible import visible
from launcher.commands.arguments import add_json
from launcher.status import listing, tables


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="default: runs")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    folder = options.folder.resolve()
    found = listing.summaries(folder)
    if options.json:
        print(json.dumps([asdict(item) | {"run": str(item.run)} for item in found], indent=2))
    elif found:
        tables.runs(found, folder)
    else:
        print(f"no run in {visible(str(folder))}")
    return 0
