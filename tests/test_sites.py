"""The table of sites is made of the marks of tests and their outcomes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

@pytest.mark.site("a", "crashed", "works")
@pytest.mark.site("b", "hung", "says so")
def test_passes(): pass

@pytest.mark.site(case="c | d", before="lost", after="kept")
@pytest.mark.parametrize("number", [0, 1])
def test_fails_once(number): assert number

@pytest.mark.site("e", "lost", "kept")
def test_is_skipped(): pytest.skip("no Slurm")

@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.site("f", "lost", "kept"))])
def test_of_one_parameter(number): assert number

def test_without_a_mark(): assert False
"""


def test_the_page_shows_what_each_test_came_to(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = site\n")
    words = ["-m", "tests.sites", "--page", tmp_path / "page.md", f"--rootdir={tmp_path}", tmp_path / "test_it.py"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")][2:] == [
        "| a | crashed | works |",
        "| b | hung | says so |",
        "| c \\| d | lost | **fails**: kept |",
        "| e | lost | not run here |",
        "| f | lost | kept |",
    ]
    assert lines[-1] == done.stdout.splitlines()[-1] == "RESULT sites=5 passed=3 failed=1 not_run=1"
