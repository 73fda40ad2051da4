"""The command `muster import`: prints what becomes of each key, and writes the experiment."""

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.errors import ConfigError, Problem
from conf.files import write_text
from conf.visible import visible
from launcher.convert import convert
from launcher.convert.keys import Outcome, Row
from launcher.paths import CLONE

STYLES = {Outcome.kept: "green", Outcome.changed: "yellow", Outcome.unneeded: "dim", Outcome.refused: "bold red"}


def run(source: Path, program: str | None, out: Path | None, gpus: int, *, force: bool) -> int:
    """Import one file. Returns 0. Raises ConfigError for a file that cannot be read, or one that would be overwritten."""
    config = convert.read(source)
    program = program or convert.program_of(config, source)
    rows = convert.table(config, program, gpus, source.parent)
    ours = convert.experiment(rows, program)
    target = out or CLONE / "conf" / "experiment" / f"{convert.name_of(source)}.yaml"
    content = convert.text(ours, source, program, rows)
    if target.exists() and not force and target.read_text(encoding="utf-8") != content:
        raise ConfigError(Problem("--out", target, "already exists. Name another file, or add --force"))
    _print(rows)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, content)
    except OSError as error:
        message = f"cannot be written ({error.strerror}). Name another file: --out FILE.yaml"
        raise ConfigError(Problem("--out", target, message)) from None
    counts = {outcome: sum(row.outcome is outcome for row in rows) for outcome in Outcome}
    print(", ".join(f"{count} {outcome.value}" for outcome, count in counts.items()))
    print(f"written: {target}")
    chosen = f"experiment={target.stem}" if target.parent == CLONE / "conf" / "experiment" else shlex.quote(str(target))
    print(f"to run:  python launch.py {chosen} cluster=slurm {_nodes(gpus)}")
    return 0


def _nodes(gpus: int) -> str:
    """The nodes of 8 GPUs, or the one node, that have these GPUs."""
    if gpus % 8 == 0:
        return f"cluster.train.nodes={gpus // 8}"
    return f"cluster.train.nodes=1 cluster.train.ranks_per_node={gpus} cluster.train.gpus_per_node={gpus}"


def _print(rows: list[Row]) -> None:
    table = Table("key", "value", "", "Muster", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        ours = " ".join(f"{key.lstrip('/')}={_shown(value)}" for key, value in row.ours.items())
        said = ours + (f"  ({row.why})" if ours and row.why else row.why)
        outcome = Text(row.outcome.value, STYLES[row.outcome])
        table.add_row(Text(visible(row.key)), Text(visible(_shown(row.value))), outcome, Text(visible(said)))
    Console(soft_wrap=False).print(table)


def _shown(value: Any) -> str:
    words = {True: "true", False: "false", None: "null"}
    shown = words[value] if isinstance(value, bool) or value is None else str(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
