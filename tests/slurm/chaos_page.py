"""Writes docs/resilience.md from what the chaos suite has found: one line a kind of fault, then what was not survived."""

from pathlib import Path
from statistics import median
from typing import Any

from conf.files import write_text
from tests.slurm.kinds import KINDS

TOP = """\
# What a run survives

`make chaos` strikes trainings on the four-node Slurm of the tests, and writes this page. A run counts as recovered when it ends by
itself as `completed`, with the metrics of every step and the SHA-256 of every weight of the run of its layout that nothing struck.
Where going on would be wrong, the right verdict counts as stopped rightly, if the run then reaches the same weights once
the cause is gone and it is resumed. Anything else is wrong.

{faults} faults in {runs} runs (seed {seeds}), on 2 nodes: {recovered} recovered, {stopped} stopped rightly, {wrong} wrong. Runs
have 40 steps and a checkpoint every 5, written while training goes on; {struck} of them were struck twice in a row.
Layouts (runs): {layouts}.

| fault | faults | recovered | stopped rightly | wrong | steps lost | seconds without a step |
|---|---|---|---|---|---|---|
"""
BOTTOM = """
Steps lost are those that were computed a second time, in a whole run; least, median and most. Per fault a signalled stop may
lose none, a kill one interval, or two where a checkpoint was being written, and a damaged checkpoint one more: beyond that a
run is wrong. Seconds are from the fault to the first step after it, with the 6 s in which Slurm starts a job again, and with
start-up, for which all ranks share this machine's {cores} cores with those of another run; where no attempt ended, the longest
pause. A node out of reach costs Slurm's time-out (30 s here) or the hang's limit (15 s here) as well.

**Run it.** `make chaos` takes about an hour; `make chaos ARGS="--faults 5 --kinds kill_rank cable --seed 7"` chooses, and
`ARGS=--resume` goes on where it was cut short. What was drawn and found lies in runs/chaos/results.jsonl, one line a run, and
the folder of each run that went wrong beside it. RESULT counts faults, and runs that went wrong: with one the exit status is 1.

**What runs where.** `make test` has one run that meets a restarted controller, a killed slurmd and a pulled cable at once, then
a slow rank, a killed rank with a damaged checkpoint and without `latest`, and a killed batch script
(tests/slurm/test_chaos.py); a hang, a preemption and a user's error (test_requeue.py); a signal (test_resume.py); and, without
Slurm, full disks and every damage to a checkpoint (tests/jobs/checkpoint/test_checkpointing.py, test_saving.py).
`make proof` adds the time
limit, `scontrol requeue`, a lost and a bad node, hangs at the start and in a checkpoint (tests/slurm/test_requeue.py,
test_hang.py), and kills while a checkpoint is written (tests/jobs/checkpoint/test_async_save.py). `make chaos` has them all.
"""


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """The page, from the lines of results.jsonl in any order."""
    found = sorted(found, key=lambda item: item["number"])
    lines = [_line(kind.what, [item for item in found if item["kind"] == name]) for name, kind in KINDS.items()]
    write_text(path, _top(found) + "".join(lines) + _wrong(found) + _bottom(found), mode=0o644)


def _top(found: list[dict[str, Any]]) -> str:
    return TOP.format(
        faults=_count(found),
        runs=len(found),
        seeds=", ".join(map(str, sorted({item["seed"] for item in found}))),
        recovered=_count(found, "recovered"),
        stopped=_count(found, "stopped rightly"),
        wrong=_count(found, "wrong"),
        struck=sum(item["faults"] > 1 for item in found),
        layouts=", ".join(f"{name} {_with(found, name)}" for name in sorted({item["layout"] for item in found})),
    )


def _with(found: list[dict[str, Any]], layout: str) -> int:
    return sum(item["layout"] == layout for item in found)


def _bottom(found: list[dict[str, Any]]) -> str:
    return BOTTOM.format(cores=max((item["cores"] for item in found), default=1))


def _count(found: list[dict[str, Any]], outcome: str = "") -> int:
    return sum(item["faults"] for item in found if outcome in ("", item["outcome"]))


def _line(what: str, found: list[dict[str, Any]]) -> str:
    counts = [_count(found, outcome) for outcome in ("", "recovered", "stopped rightly", "wrong")]
    good = [item for item in found if item["outcome"] != "wrong"]
    lost, seconds = [item["lost"] for item in good], [each for item in good for each in item["recovery_s"]]
    cells = [what, *map(str, counts), _spread(lost), _spread(seconds)]
    return f"| {' | '.join(cells)} |\n" if found else ""


def _spread(values: list[float]) -> str:
    """Least, median and most."""
    return " / ".join(f"{value:.0f}" for value in (min(values), median(values), max(values))) if values else "-"


def _wrong(found: list[dict[str, Any]]) -> str:
    lines = [
        f"- run {item['number']} (seed {item['seed']}), {item['kind']} under {item['layout']}: {item['why']}\n"
        for item in found
        if item["outcome"] == "wrong"
    ]
    return "\n" + "".join(lines) if lines else ""
