"""Packs samples into rows of a fixed number of tokens, and says what a row costs to train.

Only indices move here: tokens stay where preprocess wrote them. Packing evens out tokens and memory, not time: attention
costs the square of each sample's length, so rows of equal tokens differ, and `order.Order` brings like ones together.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

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
    Rows come nearly sorted by length, and `order.Order` shuffles them.
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


def hidden_factor(described: Any) -> float:
    """`attention_cost`'s factor of a Hugging Face config: a block's linear weights over its width of attention.

    Experts count as far as a token passes them. Depends on the shape alone, so that a resumed run has the same order.
    """
    of = described.get_text_config()
    hidden, heads = of.hidden_size, of.num_attention_heads
    width = heads * (getattr(of, "head_dim", None) or hidden // heads)
    shared = width * (getattr(of, "num_key_value_heads", None) or heads) // heads
    inner = (getattr(of, "intermediate_size", None) or 4 * hidden) * (getattr(of, "num_experts_per_tok", None) or 1)
    return hidden * (2 * width + 2 * shared + 3 * inner) / width


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
