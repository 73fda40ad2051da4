"""Writes docs/resilience.md from the results of the chaos suite: a table with one line per kind of fault, then the wrong runs."""

from pathlib import Path
from statistics import median
from typing import Any

from conf.files import write_text
from tests.slurm.kinds import KINDS

TOP = """\
# What a run survives

`make chaos` injects faults into trainings on the four-node Slurm cluster of the tests, and writes this page. Each run has one
of three outcomes:

- **recovered**: it ended by itself as `completed`. Its metrics of every step, and the SHA-256 of every weight, equal those of a
  run with the same layout and without a fault.
- **stopped correctly**: continuing would be wrong, so it ended with the right verdict. After the cause was removed, it was
  resumed and reached the same metrics and weights.
- **wrong**: anything else.

{faults} faults in {runs} runs (seed {seeds}), on 2 nodes: {recovered} recovered, {stopped} stopped correctly, {wrong} wrong.
Each run has 40 steps and a checkpoint every 5 steps, written while training continues. {struck} runs got two faults in a row.
Layouts (runs): {layouts}.

| fault | faults | recovered | stopped correctly | wrong | steps lost | seconds without a step |
|---|---|---|---|---|---|---|
"""
BOTTOM = """
Three numbers are minimum / median / maximum.

**Steps lost** are the steps of a whole run that were computed a second time. A run is wrong if it loses more than this per
fault: none after a signal that asks it to stop; one checkpoint interval after a kill, or two if a checkpoint was being written;
one more interval if a checkpoint was damaged.

**Seconds without a step** last from the fault to the next step, or are the longest pause if no attempt ended. They include the
6 s that Slurm takes to start a job again, and the start-up, in which all ranks share this machine's {cores} cores with those of
another run. If a node is out of reach, they also include Slurm's timeout (30 s here) or the hang limit (15 s here).

## Run it

`make chaos` takes about an hour. `make chaos ARGS="--faults 5 --kinds kill_rank cable --seed 7"` selects faults, and writes its
page beside the results. `ARGS=--resume` continues a suite that was interrupted. runs/chaos/results.jsonl has one line per run, with
its faults and its outcome. The folder of each wrong run is kept beside it. The last line of output is RESULT, with the number of
faults and the number of wrong runs. If a run is wrong, the exit status is 1.

## Which test covers what

`make test`:

- tests/slurm/test_chaos.py: one run with a restarted controller, a killed slurmd and a pulled cable at once, then a slow rank,
  then a killed rank with a damaged checkpoint and without `latest`, then a killed batch script;
- tests/slurm/test_requeue.py: a hang, a preemption;
- tests/slurm/test_chain.py: a user's error, a killed rank;
- tests/slurm/test_before_ranks.py: a script that dies before its ranks start, a step that srun refuses, a cancelled job;
- tests/slurm/test_resume.py: a signal;
- without Slurm, tests/jobs/checkpoint/test_checkpointing.py and test_async_save.py: full disks, and every kind of damage to a
  checkpoint.

`make proof` adds:

- tests/slurm/test_requeue.py: the time limit, `scontrol requeue`, a lost node, a bad node, a deleted run;
- tests/slurm/test_hang.py: hangs during start-up and during a checkpoint;
- tests/jobs/checkpoint/test_async_save.py: kills while a checkpoint is written.

`make chaos` has all faults of the table. `make slurm-versions` runs the chain of jobs, a crash, a preemption, a time limit and
requeues under this machine's Slurm and two newer ones. [What differs between sites](sites.md) has a test for each way in which
sites are set up.
"""


Result = dict[str, Any]
"""A line of results.jsonl: see `chaos.Result`."""


def write(path: Path, results: list[Result]) -> None:
    """Write the page from the lines of results.jsonl, in any order."""
    results = sorted(results, key=lambda result: result["number"])
    rows = [_row(kind.label, [result for result in results if result["kind"] == name]) for name, kind in KINDS.items()]
    write_text(path, _top(results) + "".join(rows) + _wrong(results) + _bottom(results))


def _top(results: list[Result]) -> str:
    layouts = sorted({result["layout"] for result in results})
    return TOP.format(
        faults=_count(results),
        runs=len(results),
        seeds=", ".join(map(str, sorted({result["seed"] for result in results}))),
        recovered=_count(results, "recovered"),
        stopped=_count(results, "stopped correctly"),
        wrong=_count(results, "wrong"),
        struck=sum(result["faults"] > 1 for result in results),
        layouts=", ".join(f"{name} {sum(result['layout'] == name for result in results)}" for name in layouts),
    )


def _bottom(results: list[Result]) -> str:
    return BOTTOM.format(cores=max((result["cores"] for result in results), default=1))


def _count(results: list[Result], outcome: str = "") -> int:
    """Faults in the runs with this outcome, or in all runs."""
    return sum(result["faults"] for result in results if outcome in ("", result["outcome"]))


def _row(label: str, results: list[Result]) -> str:
    counts = [_count(results, outcome) for outcome in ("", "recovered", "stopped correctly", "wrong")]
    good = [result for result in results if result["outcome"] != "wrong"]
    lost, seconds = [result["lost"] for result in good], [each for result in good for each in result["recovery_s"]]
    cells = [label, *map(str, counts), _range(lost), _range(seconds)]
    return f"| {' | '.join(cells)} |\n" if results else ""


def _range(values: list[float]) -> str:
    """Minimum / median / maximum."""
    return " / ".join(f"{value:.0f}" for value in (min(values), median(values), max(values))) if values else "-"


def _wrong(results: list[Result]) -> str:
    lines = [
        f"- run {result['number']} (seed {result['seed']}), {result['kind']} under {result['layout']}: {result['why']}\n"
        for result in results
        if result["outcome"] == "wrong"
    ]
    return "\n" + "".join(lines) if lines else ""
