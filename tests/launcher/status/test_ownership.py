"""A Slurm job id that belongs to another job by now, Slurm that does not answer, and runs of other users."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from conf import resolve
from conf.files import write_json
from launcher import __main__ as launcher
from launcher import slurm_command
from launcher.run_folder import record
from launcher.slurm import SlurmJob
from launcher.status import ownership, state
from tests.conftest import Compose, Programs, module, put, write_programs


@contextmanager
def nobody() -> Iterator[None]:
    """Be a user who owns nothing, and root again afterwards."""
    for name in ("encodings.utf_8_sig", "rich.console", "rich._unicode_data", "rich.table", "rich.text"):
        import_module(name)  # only root may be able to read this Python
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on Slurm whose training has the id 102."""
    for folder in ("code", "jobs"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    (tmp_path / "run/jobs/train.sbatch").touch()
    of_train = {"slurm_name": "tiny/train", "folder": "code"}
    launch = {"cluster": "slurm", "jobs": {"train": "102"}, "slurm": {"train": of_train}}
    write_json(tmp_path / "run/run.json", {"launches": [launch]})
    return tmp_path / "run"


def squeue(user: str, name: str, folder: Path) -> str:
    return f"echo '102|RUNNING|{user}|{name}|{folder}'"


@pytest.mark.site(
    case="Job ids start anew, or two clusters share a home",
    before="cancel of an old run ended the job of another run that has its id now",
    after="name and folder of the job are compared first; status names the other job",
)
@pytest.mark.parametrize(
    ("name", "folder", "ours"),
    [
        ("tiny/train", "run/code", True),
        ("tiny/train", "link/code", True),
        ("tiny/train", "other/code", False),
        ("tiny/preprocess", "run/code", False),
        ("tiny/train", "gone/code", False),
        ("Slurm does not answer", "run/code", False),
    ],
    ids=["its own", "through a link", "another run's", "another job of the run", "a deleted run's", "with an odd name"],
)
def test_only_its_own_job_is_cancelled(
    run: Path, programs: Programs, surroundings: dict[str, str], name: str, folder: str, ours: bool
) -> None:
    (run.parent / "other/code").mkdir(parents=True)
    (run.parent / "link").symlink_to(run)
    path = programs(squeue=squeue("me", name, run.parent / folder), sacct="exit 0", scontrol="exit 1", scancel="exit 0")
    done = module("launcher", "cancel", run, env=surroundings)
    assert (done.returncode, done.stdout) == (0, f"cancelled {int(ours)} {'job' if ours else 'jobs'}\n")
    assert (path / "scancel.calls").exists() is ours
    shown = module("launcher", "status", run, env=surroundings)
    assert (shown.returncode, "now belongs to another job" in shown.stderr) == (0, not ours)


def test_the_copy_of_a_run_does_not_cancel_the_original(
    run: Path, programs: Programs, surroundings: dict[str, str]
) -> None:
    shutil.copytree(run, run.parent / "copy")
    path = programs(
        squeue=squeue("me", "tiny/train", run / "code"), sacct="exit 0", scontrol="exit 1", scancel="exit 0"
    )
    assert module("launcher", "cancel", run.parent / "copy", env=surroundings).stdout == "cancelled 0 jobs\n"
    assert not (path / "scancel.calls").exists()


def test_what_slurm_does_not_say_does_not_count_against_a_job(tmp_path: Path) -> None:
    started = record.StartedJob("7", "slurm", "tiny/train")
    assert ownership.is_of_run(SlurmJob("7", "RUNNING"), tmp_path, started)
    assert ownership.is_of_run(SlurmJob("7", "RUNNING", name="any"), tmp_path, record.StartedJob("7", "slurm"))


BUSY = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"


@pytest.mark.site(
    case="The controller does not answer to status, stop or cancel",
    before="cancel printed `cancelled 0 jobs` and exited with 0 while the training ran on",
    after="they say that Slurm does not answer, and exit with 2",
)
@pytest.mark.parametrize("command", ["status", "why", "cancel", "stop"])
def test_silence_of_slurm_is_an_error(
    run: Path, programs: Programs, surroundings: dict[str, str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    programs(squeue=BUSY, scontrol=BUSY, sacct="exit 1", scancel="exit 0")
    monkeypatch.setattr(launcher, "WAIT_S", 0.2)
    monkeypatch.setattr(slurm_command, "LONGEST_PAUSE_S", 0.05)
    done = module("launcher", command, run, env=surroundings)
    assert done.returncode == 2
    assert "Socket timed out" in done.stderr.splitlines()[-1]
    assert "cancelled" not in done.stdout
    assert "Traceback" not in done.stderr


def test_cancel_on_a_machine_without_slurm_is_refused(
    run: Path, programs: Programs, surroundings: dict[str, str]
) -> None:
    programs()
    done = module("launcher", "cancel", run, env=surroundings)
    assert (done.returncode, done.stdout) == (2, "")
    assert "squeue is not on PATH. Type this on a login node" in done.stderr


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter; those of pytest are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
@pytest.mark.site(
    case="A colleague looks at a run, or tries to change it",
    before="a traceback",
    after="status works where the group may read; else one line says whose run it is and what to do",
)
@pytest.mark.parametrize(
    ("command", "closed", "message"),
    [
        ("status", False, ""),
        ("status", True, "belongs to daemon, and is closed to you. daemon can open a run to the group: chmod -R g+rX"),
        ("why", True, "belongs to daemon, and is closed to you"),
        ("cancel", False, "train 102 is a job of daemon: only daemon can cancel it"),
        ("stop", False, "belongs to daemon, and is closed to you"),
        ("resume", True, "belongs to daemon, and is closed to you"),
        ("resume", False, "belongs to daemon, and is closed to you"),
    ],
)
def test_a_run_of_another_user(
    run: Path, open_folder: Path, compose: Compose, command: str, closed: bool, message: str
) -> None:
    run = shutil.copytree(run, open_folder / "run")
    (run / "jobs/train").mkdir()
    resolve.save(put(compose("cluster=slurm"), {"run_dir": str(run)}), run / "config.yaml")
    for path in (run, *run.rglob("*")):
        os.chown(path, 1, 1)  # Debian's `daemon`
    if closed:
        (run / "run.json").chmod(0o600)
        (run / "config.yaml").chmod(0o600)
    answer = squeue("daemon", "tiny/train", run / "code")
    write_programs(open_folder, squeue=answer, scancel="exit 0", sbatch="exit 1", srun="", scontrol="")
    env = os.environ | {"HOME": "/", "PATH": str(open_folder)}
    with nobody():
        done = module("launcher", command, run, env=env)
    assert "Traceback" not in done.stderr
    assert (done.returncode, len(done.stderr.splitlines())) == ((2, 1) if message else (0, 0)), done.stderr
    assert message in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_a_closed_run_does_not_hide_the_others(run: Path, open_folder: Path, surroundings: dict[str, str]) -> None:
    for name in ("folder", "jobs", "lock", "open", "record"):
        shutil.copytree(run, open_folder / name)
    (open_folder / "lock/.launch.json").write_text("{}")
    for path in ("folder", "jobs/jobs", "lock/.launch.json", "record/run.json"):
        (open_folder / path).chmod(0)
    write_programs(open_folder, squeue=squeue("daemon", "tiny/train", open_folder / "open/code"))
    with nobody():
        done = module("launcher", "ls", open_folder, env=surroundings | {"HOME": "/", "PATH": str(open_folder)})
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()[1:]]
    closed = "closed to you"
    assert rows == [["jobs", closed], ["lock", closed], ["open", "running train"], ["record", closed]], done.stderr


@pytest.mark.site(
    case="A script of a run is submitted by hand, or launch.py is killed right after sbatch",
    before="the waiting job was not seen: resume queued a second training, cancel left it in the queue",
    after="jobs that start in the run's folder count, recorded or not",
)
def test_a_job_that_was_not_recorded_counts(run: Path, programs: Programs, surroundings: dict[str, str]) -> None:
    rows = {"103": run, "104": run.parent / "other"}
    lines = "; ".join(f"echo '/x.sh|{job}|PENDING|me|tiny/train|{folder}/code'" for job, folder in rows.items())
    path = programs(squeue=lines, sacct="echo '102|COMPLETED'", scancel="exit 0")
    assert state.active_jobs(run) == "tiny/train 103 is PENDING"
    assert module("launcher", "cancel", run, env=surroundings).stdout == "cancelled 1 job\n"
    assert (path / "scancel.calls").read_text() == "103\n"


def test_a_local_job_is_found_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real/run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    command = [sys.executable, "-c", "input()", str(tmp_path / "link/run/jobs/train")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        launch = {"cluster": "local", "jobs": {"train": str(process.pid)}}
        write_json(tmp_path / "real/run/run.json", {"launches": [launch]})
        for path in ("link", "real"):
            assert [job.state for job in state.job_states(tmp_path / path / "run")] == ["RUNNING"]


def test_the_owner_of_a_run_is_asked_for_in_squeue(
    run: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "other_owner", lambda path: "alice")
    path = programs(squeue=squeue("alice", "tiny/train", run / "code"))
    assert [job.state for job in state.job_states(run)] == ["RUNNING"]
    assert "--user=alice" in (path / "squeue.calls").read_text()
