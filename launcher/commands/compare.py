"""Compare runs: their results, the keys that differ, and their curves on one page."""

import argparse
import json
import math
from pathlib import Path

from conf.errors import Problem, UserError
from conf.files import write_text
from conf.visible import visible
from launcher.commands.arguments import add_json
from launcher.status import comparison, comparison_page, comparison_table, tables


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="default: compare.html")
    parser.add_argument("--cost", type=_price, metavar="PRICE", help="of a GPU-hour, to show what each run has cost")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    runs = comparison.read([path.resolve() for path in options.runs])
    results = comparison_table.table(runs, options.cost)
    page = comparison_page.render_html(runs, results, options.cost)
    try:
        write_text(options.out, page)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}): name a file, as in --out compare.html"
        raise UserError(Problem("--out", options.out, reason)) from error
    if options.json:
        keys = comparison.differing_keys(runs)
        print(json.dumps({"runs": [run.as_json(options.cost) for run in runs], "differing_keys": keys}, indent=2))
        return 0
    tables.comparison(results)
    print(f"page      {visible(str(options.out))}")
    return 0


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price: give a number, as in --cost 2.5")
    return price
