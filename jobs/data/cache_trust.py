"""Refuses a cache of tokens that other users can write to: training would take their tokens for those of its rows."""

import os
import stat
from pathlib import Path

from conf.errors import Problem, SiteError


def check(cache: Path) -> None:
    """Raise SiteError if everyone may write to the folder, or if another user made it in a folder such as /tmp.

    A folder that a group shares is trusted, also if a colleague made it.
    """
    if not cache.exists():
        return
    status, above = cache.stat(), cache.absolute().parent.stat()
    reason = ""
    if status.st_mode & stat.S_IWOTH:
        reason = f"everyone may write to it (mode {stat.S_IMODE(status.st_mode):o})"
    elif status.st_uid not in (os.getuid(), 0) and above.st_mode & stat.S_IWOTH:
        reason = f"it belongs to another user, and everyone may make folders in {cache.absolute().parent}"
    if reason:
        message = f"{reason}, so its tokens may be anybody's. Set data.cache to a folder of yours or of your group"
        raise SiteError(Problem("data.cache", cache, message))
