"""Tokenised sets on disk: built once for all runs that ask for the same, part by part, so that an interrupted build goes on.

CACHE/KEY/set.json            what the set is: its shape, counts, and what the gates found
CACHE/KEY/part-00000/*.npy    the samples: tokens (int32), trained (uint8), offsets (int64, one more than samples), and of
                              each sample its trained labels (int32), hash and its row's (uint64), file and row (int32, int64)
CACHE/.KEY.OWNER/             a build that goes on, or was interrupted; its whole parts are taken over by the next
"""

import fcntl
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from conf.errors import Problem, SiteError
from conf.files import new_folder, publish_as, read_json, write_json
from jobs.data import token_dataset as samples
from jobs.data import tokenize
from jobs.data.quality_gates import Findings
from jobs.data.sources import Block
from jobs.data.tokenize import Recipe, Tokenised, Tokeniser

log = logging.getLogger(__name__)

PART_TOKENS = 2**23
"""Tokens of a part: 42 MB in memory while it fills, and what an interruption can cost."""
SILENT_S = 300
"""Seconds after which a build that has published no part is taken for dead; one takes seconds."""
ALONE = 8
"""Blocks that are tokenised in this process before others are worth their start."""


@dataclass
class Tally:
    """What a set holds so far; `blocks` of its source have gone into its parts."""

    parts: int = 0
    blocks: int = 0
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    findings: Findings = field(default_factory=Findings)
    places: list[str] = field(default_factory=list)
    """What comes before a row's number, of each file."""

    def plain(self) -> dict[str, Any]:
        return vars(self) | {"findings": self.findings.plain()}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> "Tally":
        return cls(**(plain | {"findings": Findings(**plain["findings"])}))


def built(cache: Path, key: str) -> Path | None:
    """The folder of a set that is whole."""
    return cache / key if samples.is_whole(cache / key) else None


def build(
    cache: Path,
    key: str,
    recipe: Recipe,
    path: str,
    blocks: Callable[[], Iterator[Block]],
    unchanged: Callable[[], None],
    *,
    workers: int,
    total: tuple[int, str],
) -> Path:
    """Tokenise a set unless it is there already; of several runs that ask for the same one, one builds and the others wait.

    `blocks` begins the source anew at each call; `total` is what its last block will have read, and the unit of that.
    `unchanged` raises where the source is no longer what the key was made of. Raises what these two raise.
    """
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(cache / f".{key}.lock", key) as locked:
        if built(cache, key):
            return cache / key
        if (cache / key).exists():  # files of it have been deleted
            _remove(cache / key)
        folder = _own_folder(cache, key, adopt=locked)
        tally = _tally(folder)
        _fill(folder, tally, recipe, blocks, workers, total)
        unchanged()
        write_json(folder / "set.json", tally.plain() | {"shape": recipe.shape, "path": path})
        try:
            publish_as(folder, cache / key)
        except OSError:  # only where the file system has no locks: another run was first, with the same bytes
            if not built(cache, key):
                raise
            _remove(folder)
        for left in _abandoned(cache, key):
            _remove(left)
        return cache / key


@contextmanager
def _alone(path: Path, key: str) -> Iterator[bool]:
    """Hold the lock of a build; yields whether the file system has locks. It is the kernel's, so it goes with its process.

    Without locks two runs may build the same set side by side, each in a folder of its own: the first to end publishes.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            log.info(f"another run is building the same set ({key}); waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _own_folder(cache: Path, key: str, *, adopt: bool) -> Path:
    """A folder to build in, with the parts of one that was interrupted."""
    own = cache / f".{key}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    left = _abandoned(cache, key) if adopt else []
    if left:
        os.rename(max(left, key=_parts), own)
    own.mkdir(exist_ok=True, mode=0o700)
    return own


def _abandoned(cache: Path, key: str) -> list[Path]:
    """Folders of builds that nobody goes on with: their process is gone, or has long written nothing.

    The lock would say so too, but not on file systems where each node locks for itself (Lustre's localflock, NFS's nolock).
    """
    found = []
    with tempfile.NamedTemporaryFile(dir=cache) as fresh:
        now = Path(fresh.name).stat().st_mtime  # the file system's clock, not this node's
    for path in cache.glob(f".{key}.*-*-*"):
        host, pid = path.name.removeprefix(f".{key}.").rsplit("-", 1)[0].rsplit("-", 1)
        here = host == socket.gethostname()
        if (here and not Path(f"/proc/{pid}").exists()) or now - path.stat().st_mtime > SILENT_S:
            found.append(path)
    return found


def _remove(folder: Path) -> None:
    """Hide a folder first, so that half of it is never taken for whole."""
    hidden = folder.with_name(f".{folder.name.lstrip('.')}.{secrets.token_hex(4)}.old")
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _parts(folder: Path) -> int:
    return len(list(folder.glob("part-*")))


def _tally(folder: Path) -> Tally:
    """Where a build stands: what its newest part says."""
    parts = sorted(folder.glob("part-*"))
    return Tally.read(read_json(parts[-1] / "part.json")) if parts else Tally()


def _fill(
    folder: Path,
    tally: Tally,
    recipe: Recipe,
    blocks: Callable[[], Iterator[Block]],
    workers: int,
    total: tuple[int, str],
) -> None:
    """Write the parts that are missing."""
    if tally.blocks:
        log.info(f"going on with {tally.samples:,} samples of an interrupted build")
    open_part = _Part(folder, tally)
    with tqdm(total=total[0], unit=total[1], unit_scale=True, desc="tokenise", mininterval=1) as bar:
        for block, done in _tokenised(islice(blocks(), tally.blocks, None), recipe, workers):
            open_part.add(block, done)
            bar.update(block.read - bar.n)
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            speeds = open_part.rows / seconds, open_part.new_tokens / seconds
            bar.set_postfix_str(f"{speeds[0]:,.0f} rows/s, {speeds[1]:,.0f} tokens/s", refresh=False)
    open_part.close()


def _tokenised(blocks: Iterator[Block], recipe: Recipe, workers: int) -> Iterator[tuple[Block, Tokenised]]:
    """Blocks with their tokens, in order, whoever made them; few are in flight, so memory does not grow."""
    first = list(islice(blocks, ALONE + 1))
    if workers == 1 or len(first) <= ALONE:
        tokeniser = Tokeniser(recipe)
        yield from ((block, tokeniser(block)) for block in chain(first, blocks))
        return
    context = get_context("forkserver")  # a fork of this process would copy threads that hold locks
    context.set_forkserver_preload(["jobs.data.tokenize"])
    with ProcessPoolExecutor(workers, context, tokenize.begin, (recipe,)) as pool:
        waiting: deque[tuple[Block, Future[Tokenised]]] = deque()
        try:
            for block in chain(first, blocks):
                waiting.append((block, pool.submit(tokenize.work, block)))
                if len(waiting) > 2 * workers:
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        except BrokenProcessPool as error:
            raise SiteError(
                Problem("data.workers", workers, "a process was killed, most likely for memory: use fewer")
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Part:
    """The part that is being filled, written when it is full and when all is read."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.folder, self.tally = folder, tally
        self.waiting: list[Tokenised] = []
        self.files: list[int] = []
        self.size = self.rows = self.new_tokens = 0

    def add(self, block: Block, done: Tokenised) -> None:
        tally = self.tally
        if block.place not in tally.places[-1:]:
            tally.places.append(block.place)
        self.waiting.append(done)
        self.files.append(len(tally.places) - 1)
        tally.findings.merge(done.findings)
        tally.blocks += 1
        tally.rows += done.rows
        tally.samples += len(done.lengths)
        tally.tokens += len(done.tokens)
        tally.trained_tokens += int(done.labels.sum())
        self.rows += done.rows
        self.size += len(done.tokens)
        self.new_tokens += len(done.tokens)
        if self.size >= PART_TOKENS:
            self.close()

    def close(self) -> None:
        """Publish the part, with the tally as it stands behind it; an interruption before loses the part alone."""
        tally = self.tally
        if tally.parts and not self.size:
            return
        if not self.folder.exists() or _parts(self.folder) != tally.parts:
            raise SiteError(
                Problem(
                    "data.cache",
                    self.folder.parent,
                    "another node has taken this build over, so locks do not hold here between nodes: start again when it "
                    "is done, or name a folder on a file system with locks (Lustre: mount with flock)",
                )
            )
        number, tally.parts = tally.parts, tally.parts + 1
        counts = [len(done.lengths) for done in self.waiting]
        lengths = self._joined("lengths")
        arrays = {name: self._joined(name) for name in ("tokens", "trained", "labels", "hashes", "origins", "places")}
        arrays["offsets"] = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        arrays["files"] = np.repeat(np.asarray(self.files, dtype=np.int32), counts)
        with new_folder(self.folder / f"part-{number:05d}") as beside:
            for name, array in arrays.items():
                np.save(beside / f"{name}.npy", array)
            write_json(beside / "part.json", tally.plain())
        self.waiting, self.files, self.size = [], [], 0

    def _joined(self, name: str) -> NDArray[Any]:
        return np.concatenate([getattr(done, name) for done in self.waiting])
