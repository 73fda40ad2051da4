"""What the chaos suite draws from: the kinds of faults with what they may cost, and the runs that they strike."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from launcher.run_folder.status import USER_ERROR
from tests.slurm import faults

LAYOUTS = ("fsdp", "zero1", "zero2", "zero3", "hsdp")
STEPS, EVERY = 40, 5
WORDS = [
    "train.global_batch=8", "train.micro_batch=2", f"train.steps={STEPS}", "train.learning_rate=3e-3", "train.precision=fp32",
    "train.fingerprint=true", "train.eval_every=10", "train.log_every=1", "data.max_rows=120", f"train.save_every={EVERY}",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    what: str
    """For the table."""
    strike: Callable[[faults.Scene], str]
    """Makes it happen; returns what was drawn, in words."""
    words: tuple[str, ...] = ()
    """Overrides of the run."""
    step_s: float = 0.1
    """What the hook adds to a step, so that a fault finds the training at work."""
    sync_s: float = 0.0
    alone: bool = False
    """It touches more than the nodes of its run, so nothing may run beside it."""
    lost: int = 1
    """Checkpoint intervals that may have to be computed again, at most."""
    checkpoints: int = 0
    """How many must be there when it strikes."""
    stops: str = ""
    """The verdict with which the run must end, where going on would be wrong."""
    restarts: bool = True
    """It ends the attempt that it strikes."""
    times: int = 2
    """How often in a row it may strike one run."""


HANGS = ("cluster.network.step_timeout_s=15", "cluster.network.save_timeout_s=15")
LIMIT = ("cluster.train.time_min=2", "cluster.signal_s=30")
"""Slurm may send its signal 60 s early, so a limit of one minute might leave no time for a step."""
KINDS: dict[str, Kind] = {
    "kill_rank": Kind("SIGKILL of a rank", faults.kill_rank),
    "kill_rank_0": Kind("SIGKILL of rank 0", faults.kill_first),
    "kill_script": Kind("SIGKILL of the batch script", faults.kill_script),
    "kill_in_save": Kind("SIGKILL of a rank in the middle of a checkpoint", faults.kill_in_save, sync_s=0.5),
    "hang": Kind("SIGSTOP of a rank", faults.hang, HANGS),
    "slow": Kind("a rank that gets a tenth of its time", faults.slow, lost=0, restarts=False),
    "signal": Kind("`scancel --signal`", faults.told, lost=0),
    "preempt": Kind("preemption by a higher partition", faults.preempt, lost=0),
    "time_limit": Kind("time limit", faults.time_limit, LIMIT, step_s=2.5, lost=0, times=1),
    "requeue": Kind("`scontrol requeue` from outside", faults.requeue),
    "corrupt": Kind("a bit of the newest checkpoint flipped", faults.corrupt, lost=2, checkpoints=2),
    "truncate": Kind("a file of the newest checkpoint cut short", faults.truncate, lost=2, checkpoints=2),
    "no_latest": Kind("`latest` missing", faults.no_latest, checkpoints=1),
    "all_corrupt": Kind(
        "every checkpoint damaged", faults.corrupt_all, lost=2, checkpoints=2, stops=USER_ERROR, times=1
    ),
    "disk_full": Kind(
        "disk full while saving", faults.fill_disk, ("train.keep_checkpoints=1",), checkpoints=1, stops=USER_ERROR, times=1
    ),
    "slurmd": Kind("a node's slurmd killed, and started again", faults.slurmd, HANGS, step_s=0.5, restarts=False),
    "power": Kind("a node's power cut, and back", faults.power, HANGS),
    "cable": Kind("a node's cable pulled, and put back", faults.cable, HANGS, restarts=False),
    "controller": Kind("Slurm's controller restarted", faults.controller, step_s=0.5, alone=True, restarts=False),
}  # fmt: skip
"""By the name that `--kinds` takes."""


@dataclass(frozen=True)
class Plan:
    """One run of the suite."""

    number: int
    kind: str
    layout: str
    steps: list[int]
    """At which it is struck, in order: the second one counts from when training goes on again."""


def draw(wanted: int, seed: int, kinds: list[str]) -> list[Plan]:
    """Rounds in which each kind strikes one run, until there are as many faults as were asked for."""
    plans: list[Plan] = []
    random, count = Random(seed), 0
    while count < wanted:
        for kind in random.sample(kinds, len(kinds)):
            about = KINDS[kind]
            times = 2 if about.times > 1 and random.random() < 0.5 else 1
            steps = [random.randint(2 if not about.checkpoints else EVERY + 1, STEPS - 15), random.randint(0, 6)]
            at = [1] if kind == "time_limit" else steps[:times]
            plans.append(Plan(len(plans) + 1, kind, random.choice(LAYOUTS), at))
            count += times
            if count >= wanted:
                break
    return plans


def words(layout: str) -> list[str]:
    """The overrides of every run of a layout: HSDP needs more than one rank a node."""
    return [*WORDS, f"parallel={layout}", f"cluster.train.ranks_per_node={2 if layout == 'hsdp' else 1}"]


def environment(kind: Kind, hook: Path) -> str:
    """The override by which each rank of a run runs HOOK, which lies in the folder `hook`."""
    return f"cluster.environment={{PYTHONPATH: {hook}, FAULTS_STEP_S: '{kind.step_s}', FAULTS_SYNC_S: '{kind.sync_s}'}}"
