"""Runs the tests of layouts, models and checkpoints with the oldest libraries that pyproject.toml allows.

`make test-oldest` makes .oldest, with the packages of constraints-oldest.txt before those of .venv, and calls this.
"""

import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "constraints-oldest.txt"
FOLDERS = ("backends", "checkpoint", "consolidation", "model", "training")


class Counting:
    """A plugin of pytest that counts outcomes."""

    def __init__(self) -> None:
        self.outcomes = Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1


def pinned() -> dict[str, str]:
    """Package -> its version in constraints-oldest.txt."""
    lines = (line.split("==") for line in PINS.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return {name: pin for name, pin in lines}


def main(words: list[str]) -> int:
    """Check that the old versions are those that Python imports, then run the tests. `words` are options of pytest."""
    if other := {name: version(name) for name, pin in pinned().items() if version(name) != pin}:
        print(f"these are not the versions of {PINS.name}: {other}. Run this with make test-oldest")
        return 2
    counting, began_with = Counting(), [str(ROOT / "tests/jobs" / folder) for folder in FOLDERS]
    code = pytest.main(["-m", "not proof and not slurm", *began_with, *words], plugins=[counting])
    counts = " ".join(f"{kind}={counting.outcomes[kind]}" for kind in ("passed", "failed", "skipped"))
    libraries = " ".join(
        f"{name}={version(name)}" for name in ("transformers", "peft", "accelerate", "deepspeed", "torch")
    )
    print(f"RESULT oldest {counts} {libraries}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
