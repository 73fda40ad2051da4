"""Lets one process at a time launch into a run folder, and says who does: a lock of the kernel, and a record beside it.

The kernel drops its lock when the process ends, however it ends. On most shared file systems (NFS, GPFS, CephFS, Lustre with
`flock`) it counts on all hosts; on the others only on this host, so there the record of another host counts too.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from conf.errors import Problem, RunError
from launcher.run_folder.record import user_name

NAME, RECORD = ".launch.lock", ".launch.json"
"""Files in the run folder: the one that the kernel locks, and the record, which exists while a process holds the lock."""
LOCAL_OPTIONS = {"localflock", "noflock", "nolock", "local_lock=all", "local_lock=flock"}
"""Options of mounts whose locks are unknown to other hosts."""
LOCAL_TYPES = ("fuse", "beegfs", "9p", "afs", "pvfs", "orangefs")
"""Beginnings of the types of shared file systems whose locks other hosts may not see."""
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Holder(NamedTuple):
    """The process that launches or runs jobs in a run folder."""

    host: str
    pid: int
    user: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"


UNKNOWN = Holder("an unknown host", 0, "an unknown user", "just now")
"""Stands for the holder that a record does not tell."""

RECORD_S = 1.0
"""How long a process that has just taken the lock may need to write who it is."""


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the run folder during the block; it is made if it does not exist.

    Raises RunError that names the process which holds it already.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        # Not fcntl.lockf: its lock is lost as soon as this process closes any file object of the file.
        descriptor = os.open(run / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        raise  # it may be another user's run
    except OSError as error:
        raise RunError(Problem("run_dir", run, f"cannot be written: {error.strerror} ({error.filename})")) from error
    try:
        supported = _lock(descriptor, run)
        other = read(run)
        if other and not _is_stale(other, run, supported):
            remedy = f"is used by {other}. If that process is gone, delete {run / RECORD}"
            raise RunError(Problem("run_dir", run, remedy))
        _write_record(run, replace=other is not None)
        try:
            yield
        finally:
            (run / RECORD).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def holder(run: Path) -> Holder | None:
    """Return the process that holds the run folder now; None if there is none."""
    other = read(run)
    if other is None:
        return None
    try:
        descriptor = os.open(run / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return other
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return other
    except OSError:
        return None if _is_stale(other, run, supported=False) else other
    finally:
        os.close(descriptor)
    return None if _is_stale(other, run, supported=True) else other


def is_held_by(run: Path, pid: int) -> bool:
    """Return whether a process of this user on this host has opened the lock: the record may be anybody's, and old.

    Root sees this of all processes.
    """
    with suppress(OSError):
        lock = (run / NAME).stat()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.path.samestat(entry.stat(), lock):
                    return True
    return False


def read(run: Path) -> Holder | None:
    """Return what the record says; None without a record. Others may have written it."""
    try:
        found = Holder(**json.loads((run / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):  # it is just being written, or the disk was full
        return UNKNOWN
    texts = (found.host, found.user, found.since)
    is_good = type(found.pid) is int and found.pid > 0 and all(isinstance(text, str) for text in texts)
    return found if is_good else UNKNOWN


def _lock(descriptor: int, run: Path) -> bool:
    """Take the kernel's lock. Returns False if the file system has none. Raises RunError if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        deadline = time.monotonic() + RECORD_S
        while (found := read(run)) in (None, UNKNOWN) and time.monotonic() < deadline:
            time.sleep(0.02)
        who = found or "a process that is starting or ending"
        remedy = f"is used by {who}. Wait until it ends, or type muster cancel {run}"
        raise RunError(Problem("run_dir", run, remedy)) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def _is_stale(other: Holder, run: Path, supported: bool) -> bool:
    """Return whether the process of a record is gone, although it did not delete the record: it was killed."""
    if supported and _locks_reach_all_hosts(run):
        return True  # the kernel would not have given us the lock
    return other.host == socket.gethostname() and not Path(f"/proc/{other.pid}").exists()


def _locks_reach_all_hosts(run: Path) -> bool:
    """Return whether a lock on a file in `run` counts on every host that mounts its file system."""
    path, mount = os.path.realpath(run), ("", "", "")
    for line in _mounts().splitlines():
        _, where, kind, options, *_ = line.split()
        where = where.replace("\\040", " ")
        if (path == where or path.startswith(where.rstrip("/") + "/")) and len(where) >= len(mount[0]):
            mount = (where, kind, options)
    _, kind, options = mount
    if kind == "lustre" and "flock" not in options.split(","):
        return False
    return not kind.startswith(LOCAL_TYPES) and not LOCAL_OPTIONS & set(options.split(","))


def _mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _write_record(run: Path, replace: bool) -> None:
    """Write who holds the folder. Without a kernel lock, O_EXCL lets only one of two processes do so."""
    holder = Holder(socket.gethostname(), os.getpid(), user_name(os.getuid()), time.strftime("%Y-%m-%d %H:%M:%S"))
    if replace:
        (run / RECORD).unlink(missing_ok=True)
    try:
        descriptor = os.open(run / RECORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        remedy = f"is used by {read(run) or 'another process'}. Wait until it ends"
        raise RunError(Problem("run_dir", run, remedy)) from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(holder._asdict(), file)
