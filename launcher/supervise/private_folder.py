"""Makes a folder that only this user can use, inside one that others share, such as /tmp. Standard library and conf only.

Another user of the node can create any name in /tmp first, as a folder, a link or a file. A compiler cache holds programs that
the ranks run, so it must not lie in a folder that this user does not own alone.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from conf.errors import Problem, SiteError

CANDIDATES = 10
"""Names that are tried. All ranks of a node try them in the same order, so they find the same folder."""
OVERFLOW_ID = 65534
"""Owner that the kernel shows for root's files in a container where root is nobody (user namespaces)."""


def make(scratch: str, user_id: int) -> Path:
    """SCRATCH/muster-UID, or SCRATCH/muster-UID-N if others have been there first: a folder of mode 700 that this user owns.

    Raises SiteError if `scratch` lets others replace what is in it, OSError if it cannot be used at all.
    """
    Path(scratch).mkdir(mode=0o700, parents=True, exist_ok=True)
    if reason := _why_not_shared(Path(scratch)):
        message = (
            f"{reason}. Set cluster.scratch to a folder that only you can write to, or to one like /tmp (mode 1777)"
        )
        raise SiteError(Problem("cluster.scratch", scratch, message))
    names = [f"muster-{user_id}", *(f"muster-{user_id}-{number}" for number in range(1, CANDIDATES))]
    parent = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            if _is_made_private(parent, name, user_id):
                return Path(scratch) / name
    finally:
        os.close(parent)
    message = f"others own {names[0]} to {names[-1]} in it. Set cluster.scratch to a folder of your own"
    raise SiteError(Problem("cluster.scratch", scratch, message))


def is_private(path: Path, user_id: int) -> bool:
    """Whether only this user (and root) can change what is in a folder, or in the nearest one above it that exists."""
    existing = next((item for item in (path, *path.parents) if item.exists() or item.is_symlink()), path)
    try:
        status = existing.stat()
    except OSError:  # a link to nothing
        return False
    if existing != path:
        return status.st_uid in _owners(user_id) and (_is_sticky(status) or not _others_write(status, user_id))
    return status.st_uid in _owners(user_id) and not _others_write(status, user_id)


def _is_made_private(parent: int, name: str, user_id: int) -> bool:
    """Make a folder in the open folder `parent`, or check the one that is there. No link is followed."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    try:
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError:
        return False  # a link, a file, or another user's folder
    try:
        status = os.fstat(folder)
        if status.st_uid != user_id or _others_write(status, user_id):
            return False
        entries = [os.lstat(entry, dir_fd=folder) for entry in os.listdir(folder)]
        if not all(_is_own(entry, user_id) for entry in entries):
            return False  # something was put there while the folder was open to others
        if stat.S_IMODE(status.st_mode) != 0o700:
            os.fchmod(folder, 0o700)
        return True
    finally:
        os.close(folder)


def _is_own(status: os.stat_result, user_id: int) -> bool:
    return status.st_uid == user_id and not stat.S_ISLNK(status.st_mode)


def _why_not_shared(scratch: Path) -> str:
    """Why others could replace a folder made in `scratch`; empty if they cannot, or if it does not exist."""
    user_id = os.getuid()
    for folder in (scratch, *scratch.resolve().parents):
        try:
            status = folder.stat()
        except OSError:
            continue
        mode = f"mode {stat.S_IMODE(status.st_mode):o}"
        if folder == scratch and status.st_uid not in _owners(user_id):
            return f"{folder} belongs to another user, who could replace what is in it"
        if _is_sticky(status):
            continue
        if status.st_mode & stat.S_IWOTH or (folder == scratch and _others_write(status, user_id)):
            return f"{folder} lets others replace what is in it ({mode}, without the sticky bit)"
    return ""


def _owners(user_id: int) -> tuple[int, ...]:
    """Who may own a folder that is trusted: this user and root."""
    return (user_id, 0) if _root_is_known() else (user_id, 0, OVERFLOW_ID)


def _root_is_known() -> bool:
    """Whether this user namespace has root. In a container without it, files of root seem to be those of OVERFLOW_ID."""
    try:
        lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    except OSError:
        return True
    ranges = [[int(word) for word in line.split()] for line in lines]
    return any(outside <= 0 < outside + count for _, outside, count in ranges)


def _is_sticky(status: os.stat_result) -> bool:
    return bool(status.st_mode & stat.S_ISVTX)


def _others_write(status: os.stat_result, user_id: int) -> bool:
    """Whether others may write to a folder. A group with the number of this user is the user's own, as on most Linux systems."""
    own_group = status.st_gid == user_id
    return bool(status.st_mode & (stat.S_IWOTH | (0 if own_group else stat.S_IWGRP)))
