"""conf/files.py: what is published is complete or absent, also when the writer is killed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf import files

from .conftest import ROOT

WRITE_TEXT = """
import sys, pathlib
from conf.files import write_text
print("go", flush=True)
for number in range(10**9):
    write_text(pathlib.Path(sys.argv[1]), f"{number}\\n" * 200_000)
"""
NEW_FOLDER = """
import sys, pathlib
from conf.files import new_folder
print("go", flush=True)
for number in range(10**9):
    with new_folder(pathlib.Path(sys.argv[1]).with_name(f"folder-{number}")) as beside:
        for part in range(10):
            (beside / str(part)).write_text(f"{number}\\n" * 2_000)
"""


def kill_while_it_writes(program: str, path: Path, after_s: float) -> None:
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout
    with writer.stdout as said:
        assert said.readline() == b"go\n"
    time.sleep(after_s)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL, "the writer ended by itself"


_random = random.Random(7)
MOMENTS = [_random.uniform(0, 0.06) for _ in range(15)]


def test_a_killed_writer_leaves_the_old_text_or_the_new(tmp_path: Path) -> None:
    path, seen = tmp_path / "text", set()
    for moment in MOMENTS:
        kill_while_it_writes(WRITE_TEXT, path, moment)
        if path.exists():
            lines = path.read_text().splitlines()
            assert len(lines) == 200_000
            assert len(set(lines)) == 1
            seen.add(lines[0])
    assert seen, "no writer was ever quick enough: this test has shown nothing"


def test_a_killed_writer_leaves_whole_folders_or_none(tmp_path: Path) -> None:
    for moment in MOMENTS:
        kill_while_it_writes(NEW_FOLDER, tmp_path / "folder", moment)
        for folder in tmp_path.glob("folder-*"):
            assert [(folder / str(part)).stat().st_size for part in range(10)] == [
                2_000 * len(f"{folder.name.removeprefix('folder-')}\n")
            ] * 10
    assert any(tmp_path.glob("folder-*")), "no writer was ever quick enough: this test has shown nothing"
