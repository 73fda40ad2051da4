"""Looks at this machine: Muster itself, Python, disks, limits of processes, and the clock of the file system."""

import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from launcher import version
from launcher.doctor.check import Check, error, warning
from launcher.paths import CLONE

OLDEST_PYTHON = (3, 11)
LOGIN_PACKAGES = ("hydra-core", "omegaconf", "submitit", "jinja2", "rich")
NODE_PACKAGES = ("omegaconf", "submitit", "jinja2")
"""Compute nodes know nothing of Hydra."""
GIB = 2**30
LITTLE_GIB, TOO_LITTLE_GIB = 20.0, 1.0
"""Free space that holds a small checkpoint, and that holds not even a log."""
LONG_COMMIT = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28}")
OPEN_FILES, PROCESSES = 4096, 4096
SKEW_S = 5.0


def checks(folders: dict[str, Path], needed: Sequence[str] = LOGIN_PACKAGES) -> Iterator[Check]:
    """Look at this machine; `folders`: what lies in each folder whose disk is looked at, and the folder.

    `needed`: the packages of Muster's own that it needs.
    """
    yield Check("muster", "version", LONG_COMMIT.sub(r"\1", version.text(CLONE)))
    yield Check("muster", "system", f"{platform.system()} {platform.release()} {platform.machine()}, {_cpus()} CPUs")
    yield python(sys.version_info[:3])
    yield from packages(needed)
    for name, folder in folders.items():
        yield disk(name, folder)
    yield from limits()
    yield clock(folders["run folders"])


def python(found: tuple[int, ...]) -> Check:
    """Whether this Python is new enough for the login node's part."""
    text = ".".join(map(str, found))
    if found[:2] < OLDEST_PYTHON:
        return error("muster", "Python", text, "Muster needs Python 3.11 or later")
    return Check("muster", "Python", text)


def packages(needed: Sequence[str] = LOGIN_PACKAGES) -> Iterator[Check]:
    """The packages without which Muster itself does not work."""
    versions, missing = [], []
    for name in needed:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    yield Check("muster", "packages", ", ".join(versions))
    if missing:
        yield error("muster", "packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")


def disk(name: str, folder: Path) -> Check:
    """Free space on the disk of a folder, which may not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        free = shutil.disk_usage(existing).free / GIB
    except OSError as problem:
        return error("disk", name, f"{folder}: {problem.strerror}", "choose another folder")
    found = f"{folder}: {free:,.0f} GiB free" if free >= 10 else f"{folder}: {free:.1f} GiB free"
    if not os.access(existing, os.W_OK):
        return error("disk", name, f"{found}, and closed to you", "choose another folder")
    if free < TOO_LITTLE_GIB:
        return error("disk", name, found, "free space there, or choose another disk")
    if free < LITTLE_GIB:
        return warning("disk", name, found, "a checkpoint of a large model does not fit: see docs/memory.md")
    return Check("disk", name, found)


def limits() -> Iterator[Check]:
    """Limits of processes that are too small for data workers, many ranks, or RDMA."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield _limit("open files", files, OPEN_FILES, f"ulimit -n {OPEN_FILES * 16}, also in cluster.setup")
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    yield _limit("processes", processes, PROCESSES, f"ulimit -u {PROCESSES}, or ask the administrators")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if any(Path("/sys/class/infiniband").glob("*")) and locked != resource.RLIM_INFINITY:
        yield warning(
            "limits", "locked memory", _amount(locked), "InfiniBand needs `ulimit -l unlimited` on compute nodes"
        )
    try:
        shared = shutil.disk_usage("/dev/shm").total / GIB
    except OSError:
        return
    if shared < 1:
        remedy = "NCCL and data workers need more: in a container, start it with --shm-size or --ipc=host"
        yield warning("limits", "/dev/shm", f"{shared:.2f} GiB", remedy)


def _limit(name: str, found: int, enough: int, remedy: str) -> Check:
    if found != resource.RLIM_INFINITY and found < enough:
        return warning("limits", name, _amount(found), remedy)
    return Check("limits", name, _amount(found))


def _amount(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def clock(folder: Path) -> Check:
    """Whether the clock of the file server agrees with this machine's: ages of heartbeats and locks are told by both."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".muster-doctor-") as file:
            skew_s = Path(file.name).stat().st_mtime - time.time()
    except OSError:
        return warning(
            "clock", "file system", f"{existing} cannot be written, so it is unknown", "see the line about disks"
        )
    zone = time.strftime("%Y-%m-%d %H:%M:%S %z")
    if abs(skew_s) > SKEW_S:
        remedy = "synchronize both clocks (NTP); else hangs may be seen too early or too late"
        return warning("clock", "file system", f"{zone}; files are {skew_s:+.0f} s off", remedy)
    return Check("clock", "file system", f"{zone}; files have the same time")


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
