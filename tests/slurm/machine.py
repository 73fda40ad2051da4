"""Creates and removes what the test cluster needs from the machine: network namespaces, a bridge, host names, device files.

Each of these can be recognized as ours without any record, so that `release` works after any crash: our links are called
`muster-HOST`, our lines of the hosts file are marked and name our namespaces, and our GPUs are really /dev/null.
"""

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "muster-"
BRIDGE = f"{PREFIX}br"
NAMESPACES = Path("/run/netns")
HOSTS = Path("/etc/hosts")
MARK = b"# muster-slurm"
NULL_DEVICE = os.makedev(1, 3)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setsid": "util-linux",
}
ACCOUNTING_PACKAGES = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "mariadb": "mariadb-client-core",
}


def missing(accounting: bool) -> str | None:
    """Why a real Slurm cannot run on this machine, in one sentence. None if it can."""
    if os.geteuid() != 0:
        return "A real Slurm needs root, to make network namespaces: run this as root."
    programs = PACKAGES | (ACCOUNTING_PACKAGES if accounting else {})
    packages = sorted({package for name, package in programs.items() if shutil.which(name, path=PATH) is None})
    if accounting and not list(Path("/usr/lib").glob("*/slurm*/accounting_storage_mysql.so")):
        packages.append("slurm-wlm-mysql-plugin")
    if packages:
        return f"Programs are missing: apt-get install --no-install-recommends {' '.join(packages)}"
    # Tried inside a temporary namespace, so that this check changes nothing on the machine.
    trial = "hostname trial && ip link add name veth0 type veth peer name veth1 && ip link add name bridge0 type bridge"
    result = subprocess.run(["unshare", "--net", "--uts", "sh", "-c", trial], capture_output=True, text=True)
    if result.returncode != 0:
        return f"No permission to make namespaces and bridges on this machine ({result.stderr.strip()})."
    return None


@contextmanager
def lock() -> Iterator[None]:
    """Let only one process at a time start or stop a cluster. The lock is on the hosts file, so no extra file is needed."""
    with HOSTS.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def borrow(addresses: Mapping[str, str], *, login_address: str, gpus: int, root: Path) -> None:
    """Make a network namespace for each host of `addresses`, all on one bridge; add names to the hosts file; make fake GPUs."""
    if taken := [host for host in addresses if (NAMESPACES / host).exists()]:
        raise FileExistsError(
            f"network namespaces {', '.join(taken)} exist already and are not a cluster's: remove with ip netns delete"
        )
    # The names are added first, because they tell which namespaces are ours. They go to the beginning of the file: removing
    # them then restores its bytes, with or without a newline at its end.
    ours = [f"{address} {host} ".encode() + MARK + f" {root}\n".encode() for host, address in addresses.items()]
    HOSTS.write_bytes(b"".join(ours) + HOSTS.read_bytes())
    lines = [f"link add {BRIDGE} type bridge", f"address add {login_address}/24 dev {BRIDGE}", f"link set {BRIDGE} up"]
    for host in addresses:
        link = PREFIX + host
        lines += [f"netns add {host}", f"link add {link} type veth peer name eth0 netns {host}"]
        lines += [f"link set {link} master {BRIDGE} up"]
    _ip("-batch", "-", text="\n".join(lines))
    for host, address in addresses.items():
        inside = ["link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up"]
        _ip("-n", host, "-batch", "-", text="\n".join(inside))
    for index in range(gpus):
        path = Path(f"/dev/nvidia{index}")
        if not path.exists():  # Slurm sets CUDA_VISIBLE_DEVICES only for character devices of this name
            os.mknod(path, 0o666 | stat.S_IFCHR, NULL_DEVICE)


def release() -> None:
    """Kill every process in our namespaces and remove all that `borrow` made, in whatever state it is."""
    hosts = [line.split()[1].decode() for line in _our_lines()]
    kill(hosts)
    # Before the namespaces: the kernel deletes those, and with them links, in the background.
    for link in Path("/sys/class/net").glob(f"{PREFIX}*"):
        try:
            _ip("link", "delete", link.name)
        except OSError:
            if link.exists():
                raise
    for host in hosts:
        if (NAMESPACES / host).exists():
            _ip("netns", "delete", host)
    if NAMESPACES.is_dir() and not any(NAMESPACES.iterdir()):  # `ip netns add` made it, mounted onto itself
        subprocess.run(["umount", NAMESPACES], capture_output=True, check=False)
        with suppress(OSError):
            NAMESPACES.rmdir()
    for device in Path("/dev").glob("nvidia[0-9]*"):
        if device.is_char_device() and device.stat().st_rdev == NULL_DEVICE:
            device.unlink()
    if hosts:  # in place: inside a container the file is a mount and cannot be replaced
        lines = HOSTS.read_bytes().splitlines(keepends=True)
        HOSTS.write_bytes(b"".join(line for line in lines if MARK not in line))


def roots() -> list[Path]:
    """Folders of the clusters that have lines in the hosts file: at most one, unless something went wrong."""
    return sorted({Path(line.split(MARK)[1].strip().decode()) for line in _our_lines()})


def inside(host: str, command: Sequence[str | Path]) -> list[str | Path]:
    """`command`, wrapped so that it runs with the network and the host name of `host`.

    `ip netns exec` cannot be used: it remounts /sys, and slurmd then finds no cgroup file system.
    """
    rename = 'hostname "$0" && exec "$@"'
    return ["nsenter", f"--net={NAMESPACES / host}", "unshare", "--uts", "sh", "-c", rename, host, *command]


def set_cable(host: str, *, plugged: bool) -> None:
    """Switch the bridge's end of a host's link on or off. When it is off, the host sees an eth0 without carrier."""
    _ip("link", "set", PREFIX + host, "up" if plugged else "down")


def is_on(pid: int, hosts: Sequence[str]) -> bool:
    """Whether the process is alive in the network namespace of one of `hosts`. A zombie has no namespace anymore."""
    with suppress(OSError):
        return _identity(Path(f"/proc/{pid}/ns/net")) in _spaces(hosts)
    return False


def kill(hosts: Sequence[str], timeout_s: float = 10) -> None:
    """Kill -9 all processes of `hosts`, found by namespace: daemons, job steps and all that these have started.

    Raises TimeoutError if some are still alive after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while pids := [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if is_on(int(entry.name), hosts)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} of {', '.join(hosts)} are alive {timeout_s:g} s after SIGKILL")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _our_lines() -> list[bytes]:
    return [line for line in HOSTS.read_bytes().splitlines() if MARK in line]


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _spaces(hosts: Sequence[str]) -> set[tuple[int, int]]:
    paths = [NAMESPACES / host for host in hosts]
    return {_identity(path) for path in paths if path.exists()}


def _ip(*arguments: str, text: str | None = None) -> None:
    result = subprocess.run(["ip", *arguments], input=text, capture_output=True, text=True, env={"PATH": PATH})
    if result.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}\n{text or ''}")
