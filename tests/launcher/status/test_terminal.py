"""launcher/status/terminal.py: colors on a real terminal; none under NO_COLOR, with TERM=dumb or into a pipe."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from conf.files import write_json
from tests.conftest import ROOT
from tests.launcher.test_interrupted_launch import read_all

RED, GREEN, ESCAPE = "\x1b[31m", "\x1b[32m", "\x1b"
COMMANDS = {
    "ls": (["ls", "."], ["failed train"], RED),
    "status": (["status", "run"], ["failed", "completed"], RED),
    "why": (["why", "run"], ["train 7 failed", "remedy:"], RED),
    "error": (["status", "nowhere"], ["is not a run folder"], "\x1b[1;31m"),
}
"""A command, what it prints, and a color that it uses on a terminal."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on this machine whose training failed."""
    folder = tmp_path_factory.mktemp("runs")
    run = folder / "run"
    launch = {"time": "2026-11-30T10:00:00+0000", "cluster": "local", "jobs": {"preprocess": "6", "train": "7"}}
    write_json(run / "run.json", {"launches": [launch | {"command": []}]})
    (run / "config.yaml").write_text("run_dir: x\n")
    verdict = {"started": 1.0, "ended": 61.0, "job_id": "7", "host": "n1", "rank": 0, "step": 3}
    failed = {"status": "failed", "reason": "RuntimeError: no", "remedy": "set it"}
    write_json(run / "jobs/train/attempt-1.json", verdict | failed)
    for job, job_id in {"preprocess": "6", "train": "7"}.items():
        write_json(run / f"jobs/{job}/attempt-1/begin.json", {"started": 1.0, "job_id": job_id, "host": "n1"})
    write_json(run / "jobs/preprocess/attempt-1.json", verdict | {"job_id": "6", "status": "completed", "reason": ""})
    return folder


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | more


def at_a_terminal(folder: Path, words: list[str], **more: str) -> str:
    """What a command shows at a terminal."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, "-m", "launcher", *words], environment(**more))
    shown = bytearray()
    read_all(terminal, shown)
    os.waitpid(process, 0)
    os.close(terminal)
    return shown.decode()


@pytest.mark.parametrize("name", COMMANDS)
def test_states_and_errors_have_colors_at_a_terminal_only(folder: Path, name: str) -> None:
    words, texts, color = COMMANDS[name]
    colored = at_a_terminal(folder, words, TERM="xterm")
    assert color in colored and (name not in ("status", "why") or GREEN in colored), colored
    no_color = at_a_terminal(folder, words, TERM="xterm", NO_COLOR="1")
    dumb = at_a_terminal(folder, words, TERM="dumb") if name == "status" else no_color
    command = [sys.executable, "-m", "launcher", *words]
    piped = subprocess.run(command, cwd=folder, env=environment(TERM="xterm"), capture_output=True, text=True)
    for plain in (no_color, dumb, piped.stdout + piped.stderr):
        assert ESCAPE not in plain
        assert all(text in plain for text in texts), plain
