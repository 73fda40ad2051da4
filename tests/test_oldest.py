"""constraints-oldest.txt, with which `make test-oldest` tests: exactly the lower bounds of pyproject.toml."""

import re
import tomllib

from tests.conftest import ROOT
from tests.oldest import pinned


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", item).groups() for item in wanted)
    del bounds["torch"]  # large, and its versions differ by device: .oldest has that of .venv
    assert {name: padded(bound) for name, bound in bounds.items()} == {
        name: padded(pin) for name, pin in pinned().items()
    }


def padded(version: str) -> list[int]:
    """[5, 0, 0] for 5."""
    return [*map(int, version.split(".")), 0, 0][:3]
