"""The command `muster import`: prints what becomes of each key, and writes the experiment."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from conf.errors import ConfigError, Problem
from conf.files import write_text
from conf.visible import visible
from launcher.convert import convert, other_files, sharding_keys, shell_script, variables
from launcher.convert.keys import Outcome, Row
from launcher.paths import CLONE
from launcher.secret_names import masked

STYLES = {Outcome.kept: "green", Outcome.changed: "yellow", Outcome.unneeded: "dim", Outcome.refused: "bold red"}


@dataclass(frozen=True)
class Source:
    """What a file of another program says."""

    config: dict[str, Any]
    program: str
    gpus: int
    extra: list[Row]
    """Rows of what stands beside the keys: variables of a script, and words that could not be read."""


def run(source: Path, program: str | None, out: Path | None, gpus: int | None, *, force: bool) -> int:
    """Import one file. Returns 0. Raises ConfigError for a file that cannot be imported, or one that would be overwritten."""
    found = read(source, program, gpus)
    rows = [*found.extra, *convert.table(found.config, found.program, found.gpus, source.parent)]
    ours = convert.experiment(rows)
    target = out or CLONE / "conf" / "experiment" / f"{convert.name_of(source)}.yaml"
    template = _take_template(ours, target)
    content = convert.text(ours, source, found.program, rows)
    _refuse_other_trainings(rows, source)
    if target.exists() and not force and target.read_text(encoding="utf-8") != content:
        raise ConfigError(Problem("--out", target, "already exists. Name another file, or add --force"))
    _print(rows)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if template is not None:
            write_text(target.with_suffix(".jinja"), template)
        write_text(target, content)
    except OSError as error:
        message = f"cannot be written ({error.strerror}). Name another file: --out FILE.yaml"
        raise ConfigError(Problem("--out", target, message)) from None
    leaves = [leaf for row in rows for leaf in row.leaves()]
    counts = {outcome: sum(leaf.outcome is outcome for leaf in leaves) for outcome in Outcome}
    print(", ".join(f"{count} {outcome.value}" for outcome, count in counts.items()))
    print(f"written: {target}" + (f" and {target.with_suffix('.jinja').name}" if template is not None else ""))
    chosen = f"experiment={target.stem}" if target.parent == CLONE / "conf" / "experiment" else shlex.quote(str(target))
    print(f"to run:  python launch.py {chosen} cluster=slurm {_nodes(found.gpus)}")
    return 0


def read(source: Path, program: str | None, gpus: int | None) -> Source:
    """The keys of a config, or of the command in a shell script. Raises ConfigError."""
    if not shell_script.is_script(source):
        config = convert.read(source)
        return Source(config, program or convert.program_of(config, source), gpus or GPUS, [])
    command = shell_script.read(source)
    config = {}
    if command.config is not None:
        if (path := convert.found_above(command.config, source.parent)) is None:
            message = f"names the config {command.config}, which is not there. Import that file instead"
            raise ConfigError(Problem("FILE", source, message))
        config = convert.read(path)
        other_files.refuse(config, path)
    gpus = gpus or command.gpus
    if name := command.keys.pop(shell_script.LAUNCH_CONFIG, None):
        path = convert.found_above(str(name), source.parent)
        launch = convert.read(path) if path else {}
        config = sharding_keys.of_accelerate(launch) | config
        gpus = gpus or launch.get("num_processes")
    found = (variables.variable(key, value) for key, value in command.variables.items())
    extra = [replace(row, key=f"${row.key}") for row in found]
    extra += [Row(word, None, Outcome.refused, why=why) for word, why in command.unread.items()]
    return Source(config | command.keys, program or command.program, gpus or GPUS, extra)


def _take_template(ours: dict[str, Any], target: Path) -> str | None:
    """The text of a chat template that the config holds itself; `ours` then names the file beside `target`."""
    template = ours.get("data.chat_template")
    if not isinstance(template, str) or not ("{%" in template or "{{" in template):
        return None
    ours["data.chat_template"] = str(target.with_suffix(".jinja"))
    return template


def _refuse_other_trainings(rows: list[Row], source: Path) -> None:
    """Raises ConfigError, below the table, if the file trains something that Muster does not."""
    last = [row for row in rows if row.ends]
    if last:
        _print(rows)
        problems = [Problem(row.key, _shown(row.value), row.why) for row in last]
        raise ConfigError(*problems)


GPUS = 8


def _nodes(gpus: int) -> str:
    """The nodes of 8 GPUs, or the one node, that have these GPUs."""
    if gpus % 8 == 0:
        return f"cluster.train.nodes={gpus // 8}"
    return f"cluster.train.nodes=1 cluster.train.ranks_per_node={gpus} cluster.train.gpus_per_node={gpus}"


def _print(rows: list[Row]) -> None:
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=WIDTH)
    columns = [Column(name, overflow="fold") for name in ("key", "value", "", "Muster")]
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in (line for whole in rows for line in _lines(whole)):
        ours = " ".join(f"{key.lstrip('/')}={_shown(value)}" for key, value in row.ours.items())
        said = ours + (f"  ({row.why})" if ours and row.why else row.why)
        outcome = Text(row.outcome.value, STYLES[row.outcome])
        table.add_row(Text(visible(row.key)), Text(visible(_shown(row.value))), outcome, Text(visible(said)))
    console.print(table)


WIDTH = 180
"""Of the table where it does not go to a terminal."""


def _lines(row: Row) -> Iterator[Row]:
    """The row, and under it those of its keys."""
    yield replace(row, value=f"{len(row.parts)} keys") if row.parts else row
    for part in row.parts:
        yield from _lines(part)


def _shown(value: Any) -> str:
    words = {True: "true", False: "false", None: "null"}
    shown = words[value] if isinstance(value, bool) or value is None else masked(str(value))
    return shown if len(shown) <= 60 else shown[:57] + "..."
