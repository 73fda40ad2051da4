"""What the machine of this rank has left. Imports no torch."""

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Host memory that this process may still take: of the machine, and of each control group that it is in."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    found = [int(lines["MemAvailable"].split()[0]) * 1024]
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    place = CGROUPS / own.lstrip("/")
    for group in (place, *place.parents):
        try:
            limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found.append(int(limit) - int(used) + int(stat["inactive_file"]))  # pages that are given back when needed
        except (OSError, ValueError):  # the root has no such files, and a group without a limit says `max`
            continue
    return min(found)
