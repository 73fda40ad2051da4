"""Builds tokenized sets on disk, once for all runs that ask for the same tokens. An interrupted build resumes at its last part.

CACHE/KEY/set.json            path, format and counts of the set, and what the quality gates found
CACHE/KEY/part-00000/*.npy    the samples: tokens (int32), trained (uint8) and offsets (int64, samples + 1), and for each
                              sample: labels (int32, number of trained labels), hashes and origins (uint64, of the sample and of
                              the first sample from its row), files (int32, index into `places` of set.json), places (int64,
                              number of its row in that file)
CACHE/.KEY.OWNER/             a build that is running or was interrupted; the next build of KEY takes over its complete parts
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
from jobs.data import tokenize
from jobs.data.quality_gates import Findings
from jobs.data.sources import Block
from jobs.data.token_dataset import is_complete
from jobs.data.tokenize import BlockTokenizer, TokenizedBlock, TokenizeSettings

log = logging.getLogger(__name__)

PART_TOKENS = 2**23
"""Tokens of a part: 42 MB in memory while it fills, and the most work that an interruption can lose."""
SILENT_S = 300
"""Seconds without a new part after which a build counts as dead. A part takes seconds."""
SERIAL_BLOCKS = 8
"""Up to this many blocks are tokenized in this process, because starting workers would take longer."""


@dataclass
class Progress:
    """Counts of the parts written so far. Every part stores the counts up to itself, so that a build can resume after it."""

    parts: int = 0
    blocks: int = 0
    """Blocks of the source that are in these parts; a resumed build skips them."""
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    findings: Findings = field(default_factory=Findings)
    places: list[str] = field(default_factory=list)
    """For each file, what precedes the row number in a location (see `Block.location`)."""

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"findings": self.findings.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        return cls(**(values | {"findings": Findings.from_json(values["findings"])}))


def find(cache: Path, key: str) -> Path | None:
    """The folder of a set if it is complete."""
    return cache / key if is_complete(cache / key) else None


def build(
    cache: Path,
    key: str,
    settings: TokenizeSettings,
    path: str,
    read_blocks: Callable[[], Iterator[Block]],
    check_unchanged: Callable[[], None],
    *,
    workers: int,
    total: tuple[int, str],
) -> Path:
    """Build a set unless it is complete, and return its folder. If several runs need the same set, one builds and the others wait.

    read_blocks: starts to read the source from its beginning at each call.
    check_unchanged: raises if the source has changed since the key was computed.
    total: `Block.read` of the last block and its unit, for the progress bar.

    Raises what `read_blocks` and `check_unchanged` raise, and SiteError if a worker was killed or locks do not work.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with _build_lock(cache / f".{key}.lock", key) as locked:
        if find(cache, key):
            return cache / key
        if (cache / key).exists():  # some of its files were deleted
            _remove(cache / key)
        folder = _build_folder(cache, key, adopt=locked)
        progress = _read_progress(folder)
        _write_parts(folder, progress, settings, read_blocks, workers=workers, total=total)
        check_unchanged()
        write_json(folder / "set.json", progress.to_json() | {"shape": settings.format, "path": path})
        try:
            publish_as(folder, cache / key)
        except OSError:  # without locks, another run can have published the same set first, with the same bytes
            if not find(cache, key):
                raise
            _remove(folder)
        for abandoned in _abandoned_builds(cache, key):
            _remove(abandoned)
        return cache / key


@contextmanager
def _build_lock(path: Path, key: str) -> Iterator[bool]:
    """Hold the lock of a build; yields False if the file system has no locks. The kernel releases it when the process ends.

    Without locks, two runs may build the same set at the same time, each in its own folder. The first to finish publishes.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
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


def _build_folder(cache: Path, key: str, *, adopt: bool) -> Path:
    """A new folder to build in. With `adopt` it takes over the parts of the abandoned build that has most of them."""
    folder = cache / f".{key}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    abandoned = _abandoned_builds(cache, key) if adopt else []
    if abandoned:
        os.rename(max(abandoned, key=_count_parts), folder)
    folder.mkdir(exist_ok=True)
    return folder


def _abandoned_builds(cache: Path, key: str) -> list[Path]:
    """Folders of builds that are dead: the process does not exist any more, or has written no part for SILENT_S.

    The lock alone cannot tell, because on some file systems it only holds within a node (Lustre's localflock, NFS's nolock).
    """
    abandoned = []
    with tempfile.NamedTemporaryFile(dir=cache) as fresh:
        now = Path(fresh.name).stat().st_mtime  # by the clock of the file system, which may differ from this node's
    for path in cache.glob(f".{key}.*-*-*"):
        host, pid = path.name.removeprefix(f".{key}.").rsplit("-", 1)[0].rsplit("-", 1)
        on_this_node = host == socket.gethostname()
        if (on_this_node and not Path(f"/proc/{pid}").exists()) or now - path.stat().st_mtime > SILENT_S:
            abandoned.append(path)
    return abandoned


def _remove(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that a half-deleted folder is never taken for a complete one."""
    hidden = folder.with_name(f".{folder.name.lstrip('.')}.{secrets.token_hex(4)}.old")
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _count_parts(folder: Path) -> int:
    return len(list(folder.glob("part-*")))


def _read_progress(folder: Path) -> Progress:
    """The progress of a build, from its newest part."""
    parts = sorted(folder.glob("part-*"))
    return Progress.from_json(read_json(parts[-1] / "part.json")) if parts else Progress()


def _write_parts(
    folder: Path,
    progress: Progress,
    settings: TokenizeSettings,
    read_blocks: Callable[[], Iterator[Block]],
    *,
    workers: int,
    total: tuple[int, str],
) -> None:
    """Write the parts that are missing."""
    if progress.blocks:
        log.info(f"resuming an interrupted build that has {progress.samples:,} samples")
    writer = _PartWriter(folder, progress)
    size, unit = total
    with tqdm(total=size, unit=unit, unit_scale=True, desc="tokenize", mininterval=1) as bar:
        for block, tokenized in _tokenize(islice(read_blocks(), progress.blocks, None), settings, workers):
            writer.add(block, tokenized)
            bar.update(block.read - bar.n)
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            speeds = writer.rows / seconds, writer.new_tokens / seconds
            bar.set_postfix_str(f"{speeds[0]:,.0f} rows/s, {speeds[1]:,.0f} tokens/s", refresh=False)
    writer.close()


def _tokenize(
    blocks: Iterator[Block], settings: TokenizeSettings, workers: int
) -> Iterator[tuple[Block, TokenizedBlock]]:
    """Yield each block with its tokens, in order, for any number of workers.

    At most 2 * workers + 1 blocks are in flight, so that memory does not grow with the source.
    """
    first = list(islice(blocks, SERIAL_BLOCKS + 1))
    if workers == 1 or len(first) <= SERIAL_BLOCKS:
        tokenize_block = BlockTokenizer(settings)
        yield from ((block, tokenize_block(block)) for block in chain(first, blocks))
        return
    context = get_context("forkserver")  # a plain fork would copy locks that other threads of this process hold
    context.set_forkserver_preload(["jobs.data.tokenize"])
    with ProcessPoolExecutor(workers, context, tokenize.start_worker, (settings,)) as pool:
        in_flight: deque[tuple[Block, Future[TokenizedBlock]]] = deque()
        try:
            for block in chain(first, blocks):
                in_flight.append((block, pool.submit(tokenize.tokenize_block, block)))
                if len(in_flight) > 2 * workers:
                    yield in_flight[0][0], in_flight.popleft()[1].result()
            while in_flight:
                yield in_flight[0][0], in_flight.popleft()[1].result()
        except BrokenProcessPool as error:
            raise SiteError(
                Problem(
                    "data.workers", workers, "a worker process was killed, most likely for memory: use fewer workers"
                )
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _PartWriter:
    """Collects tokenized blocks, and writes a part whenever it has PART_TOKENS, and at the end."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder, self.progress = folder, progress
        self.pending: list[TokenizedBlock] = []
        self.files: list[int] = []
        """For each pending block, the index of its file in `progress.places`."""
        self.size = self.rows = self.new_tokens = 0

    def add(self, block: Block, tokenized: TokenizedBlock) -> None:
        """Add a block and its tokens. Writes a part once PART_TOKENS are pending."""
        progress = self.progress
        if block.location not in progress.places[-1:]:
            progress.places.append(block.location)
        self.pending.append(tokenized)
        self.files.append(len(progress.places) - 1)
        progress.findings.merge(tokenized.findings)
        progress.blocks += 1
        progress.rows += tokenized.rows
        progress.samples += len(tokenized.lengths)
        progress.tokens += len(tokenized.tokens)
        progress.trained_tokens += int(tokenized.labels.sum())
        self.rows += tokenized.rows
        self.size += len(tokenized.tokens)
        self.new_tokens += len(tokenized.tokens)
        if self.size >= PART_TOKENS:
            self.close()

    def close(self) -> None:
        """Write the pending blocks as one part, with the progress up to it."""
        progress = self.progress
        if progress.parts and not self.size:
            return
        if not self.folder.exists() or _count_parts(self.folder) != progress.parts:
            raise SiteError(
                Problem(
                    "data.cache",
                    self.folder.parent,
                    "another node has taken over this build, so file locks do not work between nodes: start again when that "
                    "build is done, or use a folder on a file system with locks (Lustre: mount with flock)",
                )
            )
        number, progress.parts = progress.parts, progress.parts + 1
        counts = [len(tokenized.lengths) for tokenized in self.pending]
        arrays = {name: self._concatenate(name) for name in ("tokens", "trained", "labels", "hashes", "origins")}
        arrays["places"] = self._concatenate("row_numbers")
        arrays["offsets"] = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._concatenate("lengths"))])
        arrays["files"] = np.repeat(np.asarray(self.files, dtype=np.int32), counts)
        with new_folder(self.folder / f"part-{number:05d}") as temporary:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            write_json(temporary / "part.json", progress.to_json())
        self.pending, self.files, self.size = [], [], 0

    def _concatenate(self, name: str) -> NDArray[Any]:
        return np.concatenate([getattr(tokenized, name) for tokenized in self.pending])
