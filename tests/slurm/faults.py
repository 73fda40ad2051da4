"""Faults for a running training on the test cluster. Each function injects one and returns a text with its random choices."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from conf.files import read_json
from launcher import hostlist, slurm
from launcher.run_folder import attempts
from launcher.run_folder.status import TIME_LIMIT
from tests.slurm import runs
from tests.slurm.cluster import Cluster

HOOK = """
import os, sys, time

PACE, DISK = (float(os.environ.get(name, 0)) for name in ("FAULTS_STEP_S", "FAULTS_SYNC_S"))
clock, fsync = time.perf_counter, os.fsync

def slow_clock():
    if sys._getframe(1).f_globals.get("__name__") == "jobs.train_step" and sys._getframe(1).f_code.co_name == "run":
        time.sleep(PACE / 2)  # a step reads the clock twice
    return clock()

def slow_fsync(descriptor):
    if ".partial/" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(DISK)
    return fsync(descriptor)

if PACE:
    time.perf_counter = slow_clock
if DISK:
    os.fsync = slow_fsync
"""
"""sitecustomize.py for each rank: makes each step, and each fsync of a checkpoint's file, slower by some seconds.

It knows training steps by the name of their function, jobs.train_step.run."""
DISK_MB = 96
"""Size of the file system that the fault `disk_full` fills."""


@dataclass(frozen=True)
class Scene:
    """A running training, with the cluster and the random numbers for its faults."""

    run: Path
    cluster: Cluster
    random: Random

    @property
    def folder(self) -> Path:
        return self.run / "jobs/train"

    @property
    def attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        return attempts.newest_attempt(self.folder) or 0

    @property
    def job_id(self) -> str:
        return runs.job_id(self.run, "train")

    @property
    def nodes(self) -> list[str]:
        return hostlist.expand(slurm.show_job(self.job_id)["NodeList"])

    @property
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted((self.run / "checkpoints").glob("step-*"))


def _signal_rank(scene: Scene, rank: int, number: signal.Signals = signal.SIGKILL) -> str:
    os.kill(runs.ranks(scene.run)[rank], number)
    return f"rank {rank}"


def _random_rank(scene: Scene) -> int:
    return scene.random.choice(sorted(runs.ranks(scene.run)))


def kill_rank(scene: Scene) -> str:
    return _signal_rank(scene, scene.random.choice(sorted(runs.ranks(scene.run))[1:]))


def kill_rank_0(scene: Scene) -> str:
    return _signal_rank(scene, 0)


def kill_script(scene: Scene) -> str:
    [script] = runs.processes(f"/job0*{scene.job_id}/slurm_script$")
    os.kill(script, signal.SIGKILL)
    return ""


def hang(scene: Scene) -> str:
    return _signal_rank(scene, _random_rank(scene), signal.SIGSTOP)


def slow(scene: Scene) -> str:
    """Let one rank run only a tenth of the time, for 6 s."""
    rank = _random_rank(scene)
    pid = runs.ranks(scene.run)[rank]
    with suppress(ProcessLookupError):  # the training may end meanwhile
        for _ in range(12):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.45)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
    return f"rank {rank}"


def kill_in_save(scene: Scene) -> str:
    """Kill a rank after a checkpoint has been started and before it is complete."""
    before = set(_partial(scene))

    def started_checkpoint() -> bool:
        return bool(set(_partial(scene)) - before)

    runs.wait_until(started_checkpoint)
    time.sleep(scene.random.uniform(0, 0.5))
    return f"{_signal_rank(scene, _random_rank(scene))}, {' '.join(path.name for path in _partial(scene))} half written"


def _partial(scene: Scene) -> list[Path]:
    """Folders of checkpoints that are being written."""
    return sorted((scene.run / "checkpoints").glob(".step-*.partial"))


def slurmd(scene: Scene) -> str:
    """Kill slurmd and start it again, either before or after Slurm marks the node as down (30 s)."""
    return _remove_for_a_while(scene, [3, 10, 38], scene.cluster.kill_slurmd, scene.cluster.start_slurmd)


def power(scene: Scene) -> str:
    """Cut a node's power. It comes back after Slurm has marked it as down."""
    node = scene.random.choice(scene.nodes)
    scene.cluster.crash(node)

    def is_down() -> bool:
        return scene.cluster.node_states()[node].startswith("down")

    runs.wait_until(is_down)
    scene.cluster.start_slurmd(node)
    return node


def cable(scene: Scene) -> str:
    return _remove_for_a_while(scene, [3, 25, 45], scene.cluster.unplug, scene.cluster.plug)


def _remove_for_a_while(
    scene: Scene, seconds: list[int], remove: Callable[[str], None], restore: Callable[[str], None]
) -> str:
    node, wait_s = scene.random.choice(scene.nodes), scene.random.choice(seconds)
    remove(node)
    time.sleep(wait_s)
    restore(node)
    return f"{node}, for {wait_s} s"


def send_signal(scene: Scene) -> str:
    """Send USR1 or USR2 with scancel, to the ranks or to the batch script."""
    options = [f"--signal={scene.random.choice(['USR1', 'USR2'])}", *scene.random.choice([[], ["--batch"]])]
    slurm.call("scancel", *options, scene.job_id)
    return " ".join(options)


def preempt(scene: Scene) -> str:
    nodes = scene.nodes
    options = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive", "--output=/dev/null"]
    slurm.call("sbatch", "--partition=high", *options, "--wrap=sleep 2")
    return ""


def time_limit(scene: Scene) -> str:
    """Wait for the time limit: the run has two minutes."""
    verdict = scene.folder / f"attempt-{scene.attempt}.json"
    runs.wait_until(verdict.exists)
    assert read_json(verdict)["status"] == TIME_LIMIT, read_json(verdict)
    return ""


def requeue(scene: Scene) -> str:
    slurm.call("scontrol", "requeue", scene.job_id)
    return ""


def controller(scene: Scene) -> str:
    """Stop Slurm's controller for some seconds. Sometimes a rank is killed meanwhile."""
    killed, seconds = scene.random.choice([True, False]), scene.random.choice([1, 8, 15])
    scene.cluster.stop_controller()
    also = f", and {_signal_rank(scene, _random_rank(scene))} killed meanwhile" if killed else ""
    time.sleep(seconds)
    scene.cluster.start_controller()
    return f"for {seconds} s{also}"


def _between_attempts(scene: Scene, damage: Callable[[Scene], str]) -> str:
    """Kill a rank, and damage files before the next attempt reads them: Slurm takes some seconds to start it."""
    attempt = scene.attempt
    kill_rank(scene)

    def is_requeued() -> bool:
        return bool((read_json(scene.folder / f"attempt-{attempt}.json") or {}).get("next"))

    runs.wait_until(is_requeued)
    return damage(scene)


def _random_file(scene: Scene, checkpoint: Path) -> Path:
    names: list[str] = sorted(read_json(checkpoint / "manifest.json")["files"])
    return checkpoint / scene.random.choice(names)


def corrupt(scene: Scene) -> str:
    return _between_attempts(scene, lambda scene: flip(scene, scene.checkpoints[-1]))


def flip(scene: Scene, checkpoint: Path) -> str:
    """Flip one bit in one file of a checkpoint."""
    path = _random_file(scene, checkpoint)
    data = bytearray(path.read_bytes())
    data[scene.random.randrange(len(data))] ^= 1 << scene.random.randrange(8)
    path.write_bytes(data)
    return f"{checkpoint.name}/{path.name}"


def truncate(scene: Scene) -> str:
    def cut(scene: Scene) -> str:
        path = _random_file(scene, scene.checkpoints[-1])
        os.truncate(path, scene.random.randrange(path.stat().st_size))
        return f"{path.parent.name}/{path.name}"

    return _between_attempts(scene, cut)


def no_latest(scene: Scene) -> str:
    def remove(scene: Scene) -> str:
        latest = scene.run / "checkpoints/latest"
        latest.unlink(missing_ok=True)  # missing if this is the second fault, and no save came between
        return ""

    return _between_attempts(scene, remove)


def corrupt_all(scene: Scene) -> str:
    def flip_all(scene: Scene) -> str:
        shutil.copytree(scene.run / "checkpoints", _copy(scene))
        return ", ".join(flip(scene, item) for item in scene.checkpoints)

    return _between_attempts(scene, flip_all)


def _copy(scene: Scene) -> Path:
    return scene.run.with_name(f"{scene.run.name}.copy")


def fill_disk(scene: Scene) -> str:
    """Fill the disk before a checkpoint starts, or while it is written."""
    during, before = scene.random.choice([True, False]), set(_partial(scene))
    if during:
        deadline = time.monotonic() + 60
        while not set(_partial(scene)) - before and time.monotonic() < deadline:
            time.sleep(0.002)
    folder = scene.run / "checkpoints"
    free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with (folder / "filler").open("wb") as file, suppress(OSError):
        file.write(bytes(free_bytes + 2**20))
    return "during a checkpoint" if during else "before a checkpoint"


@contextmanager
def small_disk(run: Path) -> Iterator[None]:
    """Mount a file system of DISK_MB, kept in a file, as the run's checkpoints folder."""
    image, folder = run.with_name(f"{run.name}.img"), run / "checkpoints"
    with image.open("wb") as file:
        file.truncate(DISK_MB * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, capture_output=True)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    shutil.rmtree(folder / "lost+found")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)
        image.unlink()


def clear(run: Path) -> None:
    """Delete all files of a run, also if the suite was killed while its disk was mounted."""
    subprocess.run(["umount", "--lazy", run / "checkpoints"], check=False, capture_output=True)
    for path in run.parent.glob(f"{run.name}*"):
        if path.name.removeprefix(run.name) in ("", ".img", ".copy", ".error"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def repair(scene: Scene, kind: str) -> None:
    """Do what a user does before resuming a run that was stopped correctly: free the disk, or restore the checkpoints."""
    if kind == "disk_full":
        (scene.run / "checkpoints/filler").unlink()
    else:
        shutil.rmtree(scene.run / "checkpoints")
        _copy(scene).rename(scene.run / "checkpoints")


def lost_steps(run: Path, steps: int) -> int:
    """How many of the first `steps` steps were computed more than once, by the log of rank 0 of each attempt."""
    computed = 0
    for log in (run / "jobs/train").glob("attempt-*/rank-0.log"):
        text = log.read_text(errors="replace")
        logged = [int(number) for number in re.findall(r" INFO step +(\d+)/", text)]
        resumed = re.search(r" INFO resumed from .*/step-(\d+)", text)
        first = int(resumed[1]) if resumed else 0
        computed += max([first, *logged]) - first
    return computed - steps
