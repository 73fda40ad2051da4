"""Packs samples into rows of a fixed number of tokens, and deals rows to ranks so that all of them finish together.

Only indices move here: tokens stay where preprocess wrote them. The two decisions are apart, because packing evens out
tokens and memory, not time: attention costs the square of each sample's length, so rows of equal tokens differ.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packs:
    """Which samples share a row: row i holds the samples order[starts[i]:starts[i + 1]], the longest first.

    `order` is int64 of shape (samples,), a permutation; `starts` is int64 of shape (rows + 1,), from 0 to samples.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> NDArray[np.int64]:
        """The samples of one row, int64 of shape (samples in it,)."""
        return self.order[self.starts[number] : self.starts[number + 1]]

    def sums(self, values: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
        """A value of each sample (its tokens, its cost) added up row by row: float64 of shape (rows,)."""
        return np.add.reduceat(values[self.order], self.starts[:-1], dtype=np.float64) if len(self) else np.zeros(0)


def pack(lengths: NDArray[np.int64], capacity: int, seed: int | None = None) -> Packs:
    """Best fit decreasing over all samples at once: each, longest first, joins the fullest row that still has room.

    `lengths` (tokens, shape (samples,)) become as few rows of at most `capacity` tokens as best fit decreasing gives,
    e.g. Johnson et al. 1974, doi:10.1137/0203025 (at most 11/9 of the fewest, plus a constant). The same arguments give
    the same rows; a seed trades samples of equal length, so that an epoch may have other neighbours in as many rows.
    Rows come nearly sorted by length, and `balance` shuffles them.
    Raises ValueError naming the first sample shorter than one token or longer than a row.
    """
    lengths = np.asarray(lengths)
    _refuse_misfits(lengths, capacity)
    lengths = lengths.astype(np.int64)
    moves = _moves(np.bincount(lengths), capacity)
    row_of = _rows_of(moves, capacity, len(lengths))
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int64)
    return Packs(_argsort(capacity - lengths, seed)[_argsort(row_of)], starts)


def attention_cost(lengths: NDArray[np.int64], hidden_factor: float) -> NDArray[np.float64]:
    """Training cost of each sample alone in its attention mask, in units of one token through the linear layers.

    A token costs 2 W FLOPs forward in the W linear weights of a layer, and causal attention of width d (heads times
    head size) costs 2 d length for the average token of a sample (scores and values, half of them masked); backward
    costs twice as much of both. So a sample costs length + length^2 / hidden_factor with hidden_factor = W / d, which is the
    length in tokens where attention costs as much as all else: 12 times the hidden size in a GPT block, 53,248 in
    Llama 3 8B. Source: Narayanan et al. 2021, arXiv:2104.04473, section 3, whose s / 6h is s / 12h under a causal mask.
    Kernels reach less of the peak in attention than in matrix products, so a measured factor is smaller.

    Takes tokens, shape (samples,); returns float64 of the same shape. Raises ValueError unless hidden_factor is positive.
    """
    if not hidden_factor > 0:
        raise ValueError(f"hidden_factor={hidden_factor}: must be positive, about 12 times the hidden size")
    tokens = np.asarray(lengths, dtype=np.float64)
    return tokens + tokens * tokens / hidden_factor


def balance(
    costs: NDArray[np.float64], ranks: int, per_rank: int, *, seed: int | Sequence[int] = 0
) -> NDArray[np.int64]:
    """Deal rows to ranks in random steps, such that the rows all ranks run at the same time cost nearly the same.

    `costs` is one number a row, shape (rows,). Returns row numbers, int64 of shape (steps, ranks, per_rank): in step s
    rank r runs rows [s, r, 0], [s, r, 1], ... one after the other or in micro batches. Neighbours in the order of cost
    share a [s, :, j]; which of these meet in a step, when, and which rank gets which row are drawn by seed (with the
    epoch in it: [seed, epoch]). What holds for each j bounds the sum of a whole step, too.
    Each row comes once at most; rows % (ranks * per_rank) rows, drawn by seed, are DROPPED, so another epoch has them.
    Raises ValueError when there are fewer rows than one step takes.
    """
    if min(ranks, per_rank) < 1:
        raise ValueError(f"ranks={ranks}, per_rank={per_rank}: both must be at least 1")
    steps = len(costs) // (ranks * per_rank)
    if steps == 0:
        raise ValueError(f"{len(costs)} rows: one step of {ranks} ranks with {per_rank} each needs {ranks * per_rank}")
    random = np.random.default_rng(seed)
    kept = random.permutation(len(costs))[: steps * ranks * per_rank]
    alike = kept[np.argsort(np.asarray(costs)[kept], kind="stable")].reshape(-1, ranks)
    dealt = random.permuted(random.permutation(alike), axis=1)
    return np.ascontiguousarray(dealt.reshape(steps, per_rank, ranks).transpose(0, 2, 1))


def spread(costs: NDArray[np.float64], assignment: NDArray[np.int64]) -> NDArray[np.float64]:
    """(max - min) / mean over ranks of what they run at the same time: the share of it that the fastest rank waits.

    `costs` of shape (rows,), `assignment` as `balance` returns it; float64 of shape (steps, per_rank), 0.02 is 2 %.
    """
    found = np.asarray(costs, dtype=np.float64)[assignment]
    apart: NDArray[np.float64] = (found.max(axis=1) - found.min(axis=1)) / found.mean(axis=1)
    return apart


def _refuse_misfits(lengths: NDArray[np.int64], capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a row holds at least one token")
    if lengths.ndim != 1 or (len(lengths) and not np.issubdtype(lengths.dtype, np.integer)):
        raise ValueError(f"lengths: shape {lengths.shape} of {lengths.dtype} is not one whole number a sample")
    wrong = (lengths < 1) | (lengths > capacity)
    if wrong.any():
        first = int(wrong.argmax())
        why = "is shorter than 1" if lengths[first] < 1 else f"is longer than capacity={capacity}"
        raise ValueError(f"sample {first}: its length of {lengths[first]} tokens {why}; drop it or cut it first")


def _argsort(keys: NDArray[np.int64], seed: int | None = None) -> NDArray[np.int64]:
    """Stable argsort of keys from 0 to 2^32 - 1, 16 bits at a time: numpy sorts those by radix, wider ones far slower.

    With a seed, equal keys come in random order.
    """
    order = np.arange(len(keys)) if seed is None else np.random.default_rng(seed).permutation(len(keys))
    for shift in range(0, max(1, int(keys.max(initial=0)).bit_length()), 16):
        digit = (keys >> shift).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order


def _moves(counts: NDArray[np.int64], capacity: int) -> list[tuple[int, int, int, int]]:
    """Best fit decreasing on counts alone: (room before, room after, rows, samples each), in order of falling length.

    Rows with equal room are alike, so samples of one length are placed in bulk. The rows that fit best keep doing so
    until nothing of that length fits: each takes room // length of them, whatever their number, then the next best.
    This takes a few thousand moves (microseconds each) where there are a million samples.
    """
    with_room = [0] * (capacity + 1)  # how many rows have so much room
    rooms: list[int] = []  # those with any, ascending
    moves = []
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            place = bisect_left(rooms, length)
            room = rooms[place] if place < len(rooms) else capacity
            each = min(left, room // length)
            rows = left // each
            if place < len(rooms):
                rows = min(rows, with_room[room])
                with_room[room] -= rows
                if not with_room[room]:
                    del rooms[place]
            after = room - each * length
            if after:
                if not with_room[after]:
                    insort(rooms, after)
                with_room[after] += rows
            left -= rows * each
            moves.append((room, after, rows, each))
    return moves


def _rows_of(moves: list[tuple[int, int, int, int]], capacity: int, samples: int) -> NDArray[np.int64]:
    """The row of each sample, samples counted in order of falling length: int64 of shape (samples,).

    Rows with equal room wait in line. All lines lie in one array, each where `head` and `tail` say; that of whole
    capacity holds the new rows, numbered as they are opened.
    """
    sizes = np.zeros(capacity + 1, dtype=np.int64)
    for room, after, rows, _ in moves:
        sizes[after] += rows
        if room == capacity:
            sizes[capacity] += rows
    ends = np.cumsum(sizes)
    head, tail = (ends - sizes).tolist(), (ends - sizes).tolist()
    lines = np.empty(int(sizes.sum()), dtype=np.int64)
    lines[head[capacity] :] = np.arange(sizes[capacity])
    row_of = np.empty(samples, dtype=np.int64)
    done = 0
    for room, after, rows, each in moves:
        taken = lines[head[room] : head[room] + rows]
        head[room] += rows
        lines[tail[after] : tail[after] + rows] = taken
        tail[after] += rows
        row_of[done : done + rows * each] = taken if each == 1 else np.repeat(taken, each)
        done += rows * each
    return row_of
