"""`muster completion`: what TAB completes in a real bash, zsh and fish."""

import os
import pty
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, tool
from tests.launcher.test_interrupted_launch import read_all
from tests.slurm.runs import wait_until

pytest.importorskip("shtab")
LINES = {
    "muster stat": "muster status",
    "muster status --wa": "muster status --watch",
    "muster status runs/de": "muster status runs/demo-1",
    "muster logs oth": "muster logs runs/sweep/other-2",
    "muster logs runs/demo-1 --job conso": "muster logs runs/demo-1 --job consolidate",
    "muster doctor --cluster sl": "muster doctor --cluster slurm",
    "muster run train.warmup_st": "muster run train.warmup_steps=",
}
"""What is typed before TAB, and the line after it. Runs are found by their names too."""


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with runs, and an environment with the command."""
    folder = tmp_path_factory.mktemp("completion")
    for name in ("runs/demo-1/config.yaml", "runs/sweep/sweep.json", "runs/sweep/other-2/config.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    command = folder / "bin/muster"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {sys.executable} -m launcher "$@"\n')
    command.chmod(0o755)
    return folder, os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "$ "}


def in_bash(folder: Path, environment: dict[str, str]) -> Callable[[str], str]:
    def completed(line: str) -> str:
        *before, word = line.split()
        script = f"""source <(muster completion bash); COMP_WORDS=({line}); COMP_CWORD={len(before)}
            compopt() {{ :; }}; _muster muster {word} {before[-1]}; printf '%s\\n' "${{COMPREPLY[@]}}" """
        words = [tool("bash"), "--norc", "-c", script]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return " ".join([*before, done.stdout.rstrip("\n")])

    return completed


def in_fish(folder: Path, environment: dict[str, str]) -> Callable[[str], str]:
    def completed(line: str) -> str:
        script = f"muster completion fish | source; complete -C {shlex.quote(line)}"
        words = [tool("fish"), "--no-config", "-c", script]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        found = {row.split("\t")[0].rstrip("/") for row in done.stdout.splitlines()}
        return " ".join([*line.split()[:-1], *found])

    return completed


def in_zsh(folder: Path, environment: dict[str, str]) -> Callable[[str], str]:
    """Zsh completes at a terminal only."""

    def completed(line: str) -> str:
        shown, zsh = bytearray(), tool("zsh")
        process, terminal = pty.fork()
        if process == 0:
            os.chdir(folder)
            os.execve(zsh, [zsh, "-f", "-i"], environment)
        threading.Thread(target=read_all, args=(terminal, shown), daemon=True).start()
        setup = 'autoload -Uz compinit; compinit -u -D; eval "$(muster completion zsh)"; echo rea""dy'
        os.write(terminal, setup.encode() + b"\n")
        wait_until(lambda: b"ready" in shown)
        shown.clear()
        os.write(terminal, line.encode() + b"\t")
        wait_until(lambda: LINES[line].split()[-1] in shown.replace(b"\b", b"").decode())
        os.write(terminal, b"\x15exit\n")
        os.waitpid(process, 0)
        return " ".join([*line.split()[:-1], LINES[line].split()[-1]])

    return completed


@pytest.mark.parametrize("shell", [in_bash, in_zsh, in_fish], ids=["bash", "zsh", "fish"])
def test_tab_completes(
    surroundings: tuple[Path, dict[str, str]], shell: Callable[[Path, dict[str, str]], Callable[[str], str]]
) -> None:
    completed = shell(*surroundings)
    lines = dict(LINES.items() if shell is in_bash else [*LINES.items()][1:4])
    assert {line: completed(line) for line in lines} == lines
