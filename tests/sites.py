"""Runs the tests that are marked with `site`, and writes docs/sites.md from them: `python -m tests.sites` or `make sites`.

Each mark `@pytest.mark.site(case, before, after)` is a line of the page's table. A test, or one `pytest.param` of it, may have
several. Arguments are passed on to pytest: `python -m tests.sites -k held` runs some, and the lines of all others say so.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from conf.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = """\
# What differs between sites

Slurm is set up in many ways, and each row is one of them, or something that goes wrong at some sites: what a run did there
before it was looked at, and what it does now. Behind each row is a test, most of them on a real Slurm of four nodes.
`make sites` runs these tests and writes this page. A row whose test fails says **fails**.

| case | before | after |
|---|---|---|
{rows}

{result}
"""


@dataclass
class Row:
    """A line of the table, and what the tests with this mark have come to."""

    case: str
    before: str
    after: str
    outcome: str = "not run here"
    """`passed`, `failed`, or why there is no outcome."""

    def cells(self) -> list[str]:
        """The three columns."""
        now = {"passed": self.after, "failed": f"**fails**: {self.after}"}.get(self.outcome, self.outcome)
        return [text.replace("|", "\\|").replace("\n", " ") for text in (self.case, self.before, now)]


class Collector:
    """A plugin of pytest that keeps the marks and the outcome of each test."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        """By case, in the order of the tests."""
        self.tests: dict[str, list[Row]] = {}
        """The rows of each test by its id."""

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Add the rows of a test."""
        for mark in reversed(list(item.iter_markers("site"))):  # the innermost comes first
            row = Row(*mark.args, **mark.kwargs)
            self.tests.setdefault(item.nodeid, []).append(self.rows.setdefault(row.case, row))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set the outcome of the rows. One failure is not outweighed by tests with the same mark that pass."""
        for row in self.tests.get(report.nodeid, []):
            if report.outcome == "failed":
                row.outcome = "failed"
            elif report.when == "call" and report.outcome == "passed" and row.outcome != "failed":
                row.outcome = "passed"


def result(rows: Sequence[Row]) -> str:
    """The last line of the page and of the output."""
    passed, failed = (sum(row.outcome == outcome for row in rows) for outcome in ("passed", "failed"))
    return f"RESULT sites={len(rows)} passed={passed} failed={failed} not_run={len(rows) - passed - failed}"


def page(rows: Sequence[Row]) -> str:
    """The text of docs/sites.md."""
    lines = [f"| {' | '.join(row.cells())} |" for row in rows]
    return PAGE.format(rows="\n".join(lines), result=result(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests and write the page. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.sites", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--page", type=Path, default=ROOT / "docs/sites.md", help="file to write (docs/sites.md)")
    options, more = parser.parse_known_args(arguments)
    collector = Collector()
    status = pytest.main(["-q", "-m", "site", *more], plugins=[collector])
    rows = list(collector.rows.values())
    if not rows:  # a wrong argument, or tests that cannot be imported
        return int(status) or 1
    write_text(options.page, page(rows), mode=0o644)
    print(result(rows))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
