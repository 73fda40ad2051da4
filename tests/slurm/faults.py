"""What can happen to a training on the test cluster: one function a kind of fault, which makes it happen to a running one."""

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
from launcher import slurm
from launcher.run_folder import attempts
from launcher.run_folder.status import TIME_LIMIT
from tests.slurm import runs
from tests.slurm.cluster import Cluster

HOOK = """
import os, sys, time

PACE, DISK = (float(os.environ.get(name, 0)) for name in ("FAULTS_STEP_S", "FAULTS_SYNC_S"))
clock, fsync = time.perf_counter, os.fsync

def paced():
    if sys._getframe(1).f_globals.get("__name__") == "jobs.train" and sys._getframe(1).f_code.co_name == "_train_step":
        time.sleep(PACE / 2)  # a step looks at the clock twice
    return clock()

def slow(descriptor):
    if ".partial/" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(DISK)
    return fsync(descriptor)

if PACE:
    time.perf_counter = paced
if DISK:
    os.fsync = slow
"""
"""What Python runs first in each rank: seconds more for each step, and for each flush of a file of a checkpoint."""
DISK_MB = 96


@dataclass(frozen=True)
class Scene:
    """A training that is running, and what its fault is drawn from."""

    run: Path
    cluster: Cluster
    random: Random

    @property
    def folder(self) -> Path:
        return self.run / "jobs/train"

    @property
    def attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        return attempts.newest(self.folder) or 0

    @property
    def job_id(self) -> str:
        return runs.job_id(self.run, "train")

    @property
    def nodes(self) -> list[str]:
        return slurm.hostnames(slurm.job(self.job_id)["NodeList"])

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are published, oldest first."""
        return sorted((self.run / "checkpoints").glob("step-*"))


def _kill(scene: Scene, rank: int, number: signal.Signals = signal.SIGKILL) -> str:
    os.kill(runs.ranks(scene.run)[rank], number)
    return f"rank {rank}"


def _any(scene: Scene) -> int:
    return scene.random.choice(sorted(runs.ranks(scene.run)))


def kill_rank(scene: Scene) -> str:
    return _kill(scene, scene.random.choice(sorted(runs.ranks(scene.run))[1:]))


def kill_first(scene: Scene) -> str:
    return _kill(scene, 0)


def kill_script(scene: Scene) -> str:
    [script] = runs.processes(f"/job0*{scene.job_id}/slurm_script$")
    os.kill(script, signal.SIGKILL)
    return ""


def hang(scene: Scene) -> str:
    return _kill(scene, _any(scene), signal.SIGSTOP)


def slow(scene: Scene) -> str:
    """One rank runs a tenth of the time, for 6 s."""
    rank = _any(scene)
    pid = runs.ranks(scene.run)[rank]
    with suppress(ProcessLookupError):  # the training was done before
        for _ in range(12):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.45)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
    return f"rank {rank}"


def kill_in_save(scene: Scene) -> str:
    """Once a checkpoint is being written, and before it is published."""
    before = set(_partial(scene))
    runs.until(lambda: set(_partial(scene)) - before)
    time.sleep(scene.random.uniform(0, 0.5))
    return f"{_kill(scene, _any(scene))}, {' '.join(path.name for path in _partial(scene))} half written"


def _partial(scene: Scene) -> list[Path]:
    return sorted((scene.run / "checkpoints").glob(".step-*.partial"))


def slurmd(scene: Scene) -> str:
    """Slurm calls a node down after 30 s: now and then it is back before that."""
    return _away(scene, [3, 10, 38], scene.cluster.kill_slurmd, scene.cluster.start_slurmd)


def power(scene: Scene) -> str:
    node = scene.random.choice(scene.nodes)
    scene.cluster.crash(node)
    runs.until(lambda: scene.cluster.node_states()[node].startswith("down"))
    scene.cluster.start_slurmd(node)
    return node


def cable(scene: Scene) -> str:
    return _away(scene, [3, 25, 45], scene.cluster.unplug, scene.cluster.plug)


def _away(scene: Scene, seconds: list[int], take: Callable[[str], None], give_back: Callable[[str], None]) -> str:
    node, wait_s = scene.random.choice(scene.nodes), scene.random.choice(seconds)
    take(node)
    time.sleep(wait_s)
    give_back(node)
    return f"{node}, for {wait_s} s"


def told(scene: Scene) -> str:
    words = [f"--signal={scene.random.choice(['USR1', 'USR2'])}", *scene.random.choice([[], ["--batch"]])]
    slurm.call("scancel", *words, scene.job_id)
    return " ".join(words)


def preempt(scene: Scene) -> str:
    nodes = scene.nodes
    where = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive", "--output=/dev/null"]
    slurm.call("sbatch", "--partition=high", *where, "--wrap=sleep 2")
    return ""


def time_limit(scene: Scene) -> str:
    """Nothing to do but wait: the run has two minutes."""
    verdict = scene.folder / f"attempt-{scene.attempt}.json"
    runs.until(verdict.exists)
    assert read_json(verdict)["status"] == TIME_LIMIT, read_json(verdict)
    return ""


def requeue(scene: Scene) -> str:
    slurm.call("scontrol", "requeue", scene.job_id)
    return ""


def controller(scene: Scene) -> str:
    """Away for some seconds, in which now and then a rank dies, too."""
    killed, seconds = scene.random.choice([True, False]), scene.random.choice([1, 8, 15])
    scene.cluster.stop_controller()
    said = f", and {_kill(scene, _any(scene))} killed meanwhile" if killed else ""
    time.sleep(seconds)
    scene.cluster.start_controller()
    return f"for {seconds} s{said}"


def _between(scene: Scene, damage: Callable[[Scene], str]) -> str:
    """Kill a rank, and damage what the next attempt will read before it begins: Slurm takes some seconds to start it."""
    number = scene.attempt
    kill_rank(scene)
    runs.until(lambda: (read_json(scene.folder / f"attempt-{number}.json") or {}).get("next"))
    return damage(scene)


def _shard(scene: Scene, checkpoint: Path) -> Path:
    return checkpoint / scene.random.choice(sorted(read_json(checkpoint / "manifest.json")["files"]))


def corrupt(scene: Scene) -> str:
    return _between(scene, lambda scene: flip(scene, scene.checkpoints[-1]))


def flip(scene: Scene, checkpoint: Path) -> str:
    """One bit of one of its files."""
    path = _shard(scene, checkpoint)
    data = bytearray(path.read_bytes())
    data[scene.random.randrange(len(data))] ^= 1 << scene.random.randrange(8)
    path.write_bytes(data)
    return f"{checkpoint.name}/{path.name}"


def truncate(scene: Scene) -> str:
    def cut(scene: Scene) -> str:
        path = _shard(scene, scene.checkpoints[-1])
        os.truncate(path, scene.random.randrange(path.stat().st_size))
        return f"{path.parent.name}/{path.name}"

    return _between(scene, cut)


def no_latest(scene: Scene) -> str:
    def remove(scene: Scene) -> str:
        latest = scene.run / "checkpoints/latest"
        latest.unlink(missing_ok=True)  # struck twice in a row, a run may not have saved meanwhile
        return ""

    return _between(scene, remove)


def corrupt_all(scene: Scene) -> str:
    def flip_all(scene: Scene) -> str:
        shutil.copytree(scene.run / "checkpoints", _copy(scene))
        return ", ".join(flip(scene, item) for item in scene.checkpoints)

    return _between(scene, flip_all)


def _copy(scene: Scene) -> Path:
    return scene.run.with_name(f"{scene.run.name}.copy")


def fill_disk(scene: Scene) -> str:
    """Before a checkpoint is begun, or while it is written."""
    during, before = scene.random.choice([True, False]), set(_partial(scene))
    if during:
        deadline = time.monotonic() + 60
        while not set(_partial(scene)) - before and time.monotonic() < deadline:
            time.sleep(0.002)
    home = scene.run / "checkpoints"
    free = os.statvfs(home).f_bavail * os.statvfs(home).f_frsize
    with (home / "filler").open("wb") as file, suppress(OSError):
        file.write(bytes(free + 2**20))
    return "during a checkpoint" if during else "before a checkpoint"


@contextmanager
def small_disk(run: Path) -> Iterator[None]:
    """The run's checkpoints lie on a file system of their own, of DISK_MB in a file."""
    image, home = run.with_name(f"{run.name}.img"), run / "checkpoints"
    with image.open("wb") as file:
        file.truncate(DISK_MB * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, capture_output=True)
    home.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, home], check=True, capture_output=True)
    shutil.rmtree(home / "lost+found")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", home], check=True, capture_output=True)
        image.unlink()


def clear(run: Path) -> None:
    """Leave nothing of a run, also of one whose suite was killed."""
    subprocess.run(["umount", "--lazy", run / "checkpoints"], check=False, capture_output=True)
    for path in run.parent.glob(f"{run.name}*"):
        if path.name.removeprefix(run.name) in ("", ".img", ".copy", ".error"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def repair(scene: Scene, kind: str) -> None:
    """What somebody does before he resumes a run that has rightly stopped: frees the disk, or brings the files back."""
    if kind == "disk_full":
        (scene.run / "checkpoints/filler").unlink()
    else:
        shutil.rmtree(scene.run / "checkpoints")
        _copy(scene).rename(scene.run / "checkpoints")


def lost(run: Path, steps: int) -> int:
    """Steps that were computed more than once on the way to `steps`, by what rank 0 of each attempt has logged."""
    done = 0
    for log in (run / "jobs/train").glob("attempt-*/rank-0.log"):
        text = log.read_text(errors="replace")
        numbers = [int(number) for number in re.findall(r"^step +(\d+)/", text, re.MULTILINE)]
        began = re.search(r"^resumed from .*/step-(\d+)", text, re.MULTILINE)
        first = int(began[1]) if began else 0
        done += max([first, *numbers]) - first
    return done - steps
