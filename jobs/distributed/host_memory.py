"""Reads how much host memory this process may still use. Imports no torch."""

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Bytes this process may still allocate: the smallest of what the machine and each of its control groups (cgroup v2) allow."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    limits = [int(lines["MemAvailable"].split()[0]) * 1024]
    lines_of_cgroup = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    cgroup_path = next((line[3:] for line in lines_of_cgroup if line.startswith("0::")), "/")
    cgroup = CGROUPS / cgroup_path.lstrip("/")
    for group in (cgroup, *cgroup.parents):
        try:
            limit, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            # The kernel frees inactive pages of the page cache when a process needs memory
            limits.append(int(limit) - int(used) + int(stat["inactive_file"]))
        except (OSError, ValueError):  # the root has no such files; the limit of a group may be `max`
            continue
    return min(limits)
