"""launcher/run_folder/lock.py: one process at a time launches into a run folder, and the others learn who it is."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import RunError
from launcher.run_folder import lock
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from launcher.run_folder import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ELSEWHERE = {"host": "login2", "pid": os.getpid(), "user": "alice", "since": "2026-11-29 10:00:00"}


@pytest.fixture
def other(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path, other: "subprocess.Popen[str]") -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "link"):
        message = f"is used by process {other.pid} of .* on {socket.gethostname()}, since 20"
        with pytest.raises(RunError, match=message), lock.held(path):
            pytest.fail("two processes hold the folder")
    holder = lock.holder(tmp_path / "run")
    assert holder and holder.pid == other.pid


def test_a_killed_process_holds_nothing(tmp_path: Path, other: "subprocess.Popen[str]") -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / lock.RECORD).exists()
    assert lock.holder(tmp_path / "run") is None
    with lock.held(tmp_path / "run"):
        holder = lock.holder(tmp_path / "run")
        assert holder and holder.pid == os.getpid()
    assert lock.read(tmp_path / "run") is None


def record(run: Path, **changes: object) -> None:
    run.mkdir(exist_ok=True)
    (run / lock.RECORD).write_text(json.dumps(ELSEWHERE | changes))


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_the_record_of_another_host_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    record(tmp_path)
    with (
        pytest.raises(RunError, match=r"of alice on login2, since .* If that process is gone, delete .*\.launch\.json"),
        lock.held(tmp_path),
    ):
        pytest.fail("the process on login2 holds the folder")
    (tmp_path / lock.RECORD).unlink()  # the remedy
    with lock.held(tmp_path), pytest.raises(RunError, match=f"process {os.getpid()} "), lock.held(tmp_path):
        pytest.fail("two processes hold the folder")


def test_without_locks_a_killed_process_of_this_host_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    record(tmp_path, host=socket.gethostname(), pid=99_999_999)
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize(
    ("kind", "options", "stale"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none", True),
        ("nfs", "rw,vers=3,nolock,local_lock=all", False),
        ("lustre", "rw,flock,lazystatfs", True),
        ("lustre", "rw,localflock", False),
        ("lustre", "rw,lazystatfs", False),
        ("gpfs", "rw", True),
        ("ext4", "rw", True),
        ("fuse.sshfs", "rw", False),
        ("beegfs", "rw", False),
    ],
)
def test_a_record_of_another_host_counts_where_locks_do_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, stale: bool
) -> None:
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} {kind} {options} 0 0\n"
    monkeypatch.setattr(lock, "_mounts", lambda: mounts)
    record(tmp_path / "run")
    try:
        with lock.held(tmp_path / "run"):
            pass
    except RunError:
        assert not stale
    else:
        assert stale


def test_a_damaged_record_does_not_stop_a_launch(tmp_path: Path) -> None:
    (tmp_path / lock.RECORD).write_text("")
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("changes", [{"pid": -1}, {"pid": 0}, {"pid": "1"}, {"pid": True}, {"host": None}, {"more": 1}])
def test_what_is_no_record_names_no_process(tmp_path: Path, changes: dict[str, object]) -> None:
    record(tmp_path, **changes)
    assert lock.read(tmp_path) == lock.UNKNOWN


def test_a_process_holds_the_folder_only_if_it_has_opened_the_lock(
    tmp_path: Path, other: "subprocess.Popen[str]"
) -> None:
    assert lock.is_held_by(tmp_path / "run", other.pid)
    assert not lock.is_held_by(tmp_path / "run", os.getpid())
    assert not lock.is_held_by(tmp_path / "run", 99_999_999)
    assert not lock.is_held_by(tmp_path / "none", other.pid)
