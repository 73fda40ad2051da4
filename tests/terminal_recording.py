"""Types what a new user types, and writes what the terminal shows into docs/terminal.md: `make recording`."""

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from conf.files import write_text

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 130
MOST = 24
"""Lines that are shown of one command, half of them from its end."""
COMMANDS = (
    ("A run, from rows to a merged model, on this machine:", "muster run run_dir=runs/first"),
    ("What its jobs did:", "muster status runs/first"),
    ("What rank 1 said:", "muster logs runs/first --rank 1 --time"),
    (
        "Another one, with a smaller learning rate:",
        "muster run run_dir=runs/second pipeline=train train.learning_rate=1e-3",
    ),
    ("All runs:", "muster ls"),
    ("Both, side by side:", "muster compare runs/first runs/second"),
    ("What they used of what they asked for:", "muster efficiency runs/first"),
    ("What a key means:", "muster run --help train.learning_rate"),
    ("A typing mistake:", "muster run train.learning_rat=1e-5"),
    ("Is this machine ready?", "muster doctor"),
)
PAGE = """# What you will see

`make recording` typed these commands in an empty folder, on a machine with 2 CPU cores, without a GPU and without a network, and
wrote this page. `...` stands for lines that are left out. On a terminal, a run shows one block that is updated instead of lines.

{commands}
"""


def shown(text: str, folder: Path) -> str:
    """The output without what is only of this machine, and without the middle of a long one."""
    text = text.replace(str(folder), "~").replace(str(ROOT), "~/muster").replace(socket.gethostname(), "node1")
    text = re.sub(r"Linux \S+ ", "Linux ", text)
    lines = [line.rstrip() for line in text.rstrip().splitlines()]
    if len(lines) > MOST and "doctor" not in text:
        lines = [*lines[: MOST // 2], "...", *lines[-MOST // 2 :]]
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines)


def record(folder: Path) -> list[str]:
    """Type the commands one after the other. Returns a section for each."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": str(WIDTH)}
    sections = []
    for heading, command in COMMANDS:
        done = subprocess.run(
            command.split(),
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(f"{done.returncode} {command}", flush=True)
        sections.append(f"{heading}\n\n```\n$ {command}\n{shown(done.stdout, folder)}\n```")
    return sections


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        write_text(ROOT / "docs/terminal.md", PAGE.format(commands="\n\n".join(record(folder))))


if __name__ == "__main__":
    main()
