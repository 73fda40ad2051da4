"""Shows the status of runs until they end: one updating table on a terminal, lines with the time elsewhere."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from conf.visible import visible
from launcher.run_folder import sweep_record
from launcher.status import find, overview, status_table, sweep
from launcher.status.overview import Overview
from launcher.status.terminal import console


def watch(runs: Sequence[Path], every_s: float) -> list[Overview]:
    """Show the runs, also those of sweeps, every `every_s` seconds until no job is pending or running. Returns the last state."""
    return _on_terminal(runs, every_s) if console().is_terminal else _in_lines(runs, every_s)


def _on_terminal(runs: Sequence[Path], every_s: float) -> list[Overview]:
    from rich.console import Group
    from rich.live import Live

    found: list[Overview] = []
    with Live(console=console(), auto_refresh=False, transient=True) as live:
        for found in states(runs, every_s):
            shown = (status_table.drawn(item, with_name=len(found) > 1) for item in found)
            live.update(Group(*shown), refresh=True)
    status_table.show(found)
    return found


def _in_lines(runs: Sequence[Path], every_s: float) -> list[Overview]:
    found: list[Overview] = []
    said: dict[Path, str] = {}
    for found in states(runs, every_s):
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        for item in found:
            if (line := status_table.line(item)) != said.get(item.run):
                print(visible(f"{now}  {line}"), flush=True)
                said[item.run] = line
    return found


def states(runs: Sequence[Path], every_s: float) -> Iterator[list[Overview]]:
    """Yield the state of the runs, now and every `every_s` seconds, the last time when nothing is pending or running."""
    sweeps = [folder for folder in runs if sweep_record.is_sweep(folder)]
    while True:
        found = overview.read(find.each_run(runs))
        yield found
        is_silent = any(job.is_silent for item in found for job in item.jobs)
        if not (is_silent or any(item.is_live for item in found) or any(sweep.look(item).is_live for item in sweeps)):
            return
        time.sleep(every_s)
