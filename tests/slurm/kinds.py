"""The faults that the chaos suite can inject, what each may cost, and the random choice of runs and faults from a seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from launcher.run_folder.status import USER_ERROR
from tests.slurm import faults, launch_faults
from tests.slurm.cluster import Cluster

LAYOUTS = ("fsdp", "zero1", "zero2", "zero3", "hsdp")
STEPS, SAVE_EVERY = 40, 5
OVERRIDES = [
    "train.global_batch=8", "train.micro_batch=2", f"train.steps={STEPS}", "train.learning_rate=3e-3", "train.precision=fp32",
    "train.fingerprint=true", "train.eval_every=10", "train.log_every=1", "data.max_rows=120", f"train.save_every={SAVE_EVERY}",
]  # fmt: skip
"""Of every run of the suite."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    label: str
    """Its name in the table of docs/resilience.md."""
    inject: Callable[[faults.Scene], str] | None
    """Makes the fault happen while the run trains. Returns a text with the random choices, for example which rank."""
    overrides: tuple[str, ...] = ()
    """More overrides of the run."""
    step_s: float = 0.1
    """Seconds by which HOOK slows down each step, so that the fault finds the training at work."""
    fsync_s: float = 0.0
    """Seconds by which HOOK slows down each fsync of a checkpoint's file."""
    alone: bool = False
    """It affects more than the nodes of its run, so no other run may be beside it."""
    lost_intervals: int = 1
    """How many checkpoint intervals may at most be computed again."""
    min_checkpoints: int = 0
    """How many checkpoints must exist before the fault."""
    final_verdict: str = ""
    """The verdict with which the run must end, if continuing would be wrong."""
    ends_attempt: bool = True
    """It ends the attempt in which it happens."""
    max_times: int = 2
    """How often in a row one run may get it."""
    launch: Callable[[Cluster, Sequence[str]], launch_faults.Launched] | None = None
    """Launches the run in the presence of the fault. `inject` is None then."""


HANGS = ("cluster.network.step_timeout_s=15", "cluster.network.save_timeout_s=15")
"""Short hang limits."""
TIME_LIMIT = ("cluster.train.time_min=2", "cluster.signal_s=30")
"""Slurm may send its signal 60 s early, so a limit of one minute might leave no time for a step."""
KINDS: dict[str, Kind] = {
    "kill_rank": Kind("SIGKILL of a rank", faults.kill_rank),
    "kill_rank_0": Kind("SIGKILL of rank 0", faults.kill_rank_0),
    "kill_script": Kind("SIGKILL of the batch script", faults.kill_script),
    "kill_in_save": Kind("SIGKILL of a rank in the middle of a checkpoint", faults.kill_in_save, fsync_s=0.5),
    "hang": Kind("SIGSTOP of a rank", faults.hang, HANGS),
    "slow": Kind("a rank that gets a tenth of its time", faults.slow, lost_intervals=0, ends_attempt=False),
    "signal": Kind("`scancel --signal`", faults.send_signal, lost_intervals=0),
    "preempt": Kind("preemption by a higher partition", faults.preempt, lost_intervals=0),
    "time_limit": Kind("time limit", faults.time_limit, TIME_LIMIT, step_s=2.5, lost_intervals=0, max_times=1),
    "requeue": Kind("`scontrol requeue` from outside", faults.requeue),
    "corrupt": Kind("a bit of the newest checkpoint flipped", faults.corrupt, lost_intervals=2, min_checkpoints=2),
    "truncate": Kind("a file of the newest checkpoint cut short", faults.truncate, lost_intervals=2, min_checkpoints=2),
    "no_latest": Kind("`latest` missing", faults.no_latest, min_checkpoints=1),
    "all_corrupt": Kind(
        "every checkpoint damaged", faults.corrupt_all, lost_intervals=2, min_checkpoints=2, final_verdict=USER_ERROR, max_times=1
    ),
    "disk_full": Kind(
        "disk full while saving", faults.fill_disk, ("train.keep_checkpoints=1",), min_checkpoints=1, final_verdict=USER_ERROR,
        max_times=1,
    ),
    "slurmd": Kind("a node's slurmd killed, and started again", faults.slurmd, HANGS, step_s=0.5, ends_attempt=False),
    "power": Kind("a node's power cut, and back", faults.power, HANGS),
    "cable": Kind("a node's cable pulled, and put back", faults.cable, HANGS, ends_attempt=False),
    "controller": Kind("Slurm's controller restarted", faults.controller, step_s=0.5, alone=True, ends_attempt=False),
    "silent_requeue": Kind(
        "controller silent for 90 s when a run asks to be requeued", launch_faults.at_requeue, alone=True, lost_intervals=0,
        max_times=1,
    ),
    "silent_status": Kind(
        "controller silent for 90 s, and `muster status` meanwhile", launch_faults.at_status, step_s=4.0, alone=True,
        lost_intervals=0, ends_attempt=False, max_times=1,
    ),
    "silent_launch": Kind(
        "controller silent for 90 s at submission", None, alone=True, lost_intervals=0, launch=launch_faults.launch_in_silence
    ),
    "lost_answer": Kind(
        "sbatch that gives up after the job is queued", None, lost_intervals=0, launch=launch_faults.launch_with_a_lost_answer
    ),
    "inside_a_job": Kind(
        "launch from inside another job", None, lost_intervals=0, launch=launch_faults.launch_inside_a_job, alone=True
    ),
}  # fmt: skip
"""By the name that `--kinds` takes."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of the suite. Its fields are written to results.jsonl."""

    number: int
    kind: str
    layout: str
    steps: list[int]
    """The steps at which faults happen, in order. The second one counts from the step at which training goes on."""


def draw(min_faults: int, seed: int, kinds: list[str]) -> list[PlannedRun]:
    """Draw runs from the seed until they have at least `min_faults` faults. In each round, every kind gets one run."""
    planned: list[PlannedRun] = []
    random, count = Random(seed), 0
    while count < min_faults:
        for name in random.sample(kinds, len(kinds)):
            kind = KINDS[name]
            times = 2 if kind.max_times > 1 and random.random() < 0.5 else 1
            first = random.randint(2 if not kind.min_checkpoints else SAVE_EVERY + 1, STEPS - 15)
            steps = [first, random.randint(0, 6)]
            if kind.launch or name == "time_limit":  # the fault comes with the launch, or with the limit
                times, steps = 1, [int(kind.launch is None)]
            planned.append(PlannedRun(len(planned) + 1, name, random.choice(LAYOUTS), steps[:times]))
            count += times
            if count >= min_faults:
                break
    return planned


def overrides(layout: str) -> list[str]:
    """The overrides of every run of a layout. HSDP needs more than one rank per node."""
    return [*OVERRIDES, f"parallel={layout}", f"cluster.train.ranks_per_node={2 if layout == 'hsdp' else 1}"]


def environment(kind: Kind, hook: Path) -> str:
    """The override that makes every rank of a run execute HOOK, which is in the folder `hook`."""
    return (
        f"cluster.environment={{PYTHONPATH: {hook}, FAULTS_STEP_S: '{kind.step_s}', FAULTS_SYNC_S: '{kind.fsync_s}'}}"
    )
