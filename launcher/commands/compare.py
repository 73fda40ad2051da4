"""Compare runs: their results, the keys that differ, and their curves on one page."""

import argparse
import json
import math
from pathlib import Path

from conf.errors import Problem, UserError
from conf.files import write_text
from conf.visible import visible
from launcher.commands.arguments import add_json
from launcher.run_folder import sweep_record
from launcher.status import comparison, comparison_page, comparison_table, tables, watch


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="default: compare.html")
    parser.add_argument("--cost", type=_price, metavar="PRICE", help="of a GPU-hour, to show what each run has cost")
    form = parser.add_mutually_exclusive_group()
    add_json(form)
    form.add_argument("--watch", action="store_true", help="write the page again every 30 s, until no run is live")


def execute(options: argparse.Namespace) -> int:
    folders = [path.resolve() for path in options.runs]
    runs, results = _write(options, folders)
    if options.watch:
        print(f"page      {visible(str(options.out))}, written every {comparison_page.REFRESH_S} s", flush=True)
        sweeps = [folder for folder in folders if sweep_record.is_sweep(folder)]
        others = [run.folder for run in runs if run.folder.parent not in sweeps]
        for _ in watch.states([*sweeps, *others], comparison_page.REFRESH_S):
            runs, results = _write(options, folders)
    if options.json:
        keys = comparison.differing_keys(runs)
        print(json.dumps({"runs": [run.as_json(options.cost) for run in runs], "differing_keys": keys}, indent=2))
        return 0
    tables.comparison(results)
    print(f"page      {visible(str(options.out))}")
    return 0


def _write(
    options: argparse.Namespace, folders: list[Path]
) -> tuple[list[comparison.ComparedRun], comparison_table.Table]:
    """Write the page. Returns the runs and the table. Raises UserError if the file cannot be written."""
    runs = comparison.read(folders)
    results = comparison_table.table(runs, options.cost)
    page = comparison_page.render_html(runs, results, options.cost)
    try:
        write_text(options.out, page)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}): name a file, as in --out compare.html"
        raise UserError(Problem("--out", options.out, reason)) from error
    return runs, results


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price: give a number, as in --cost 2.5")
    return price
