"""Packs samples into rows of at most a fixed number of tokens, and computes the training cost of a row.

Packing only computes indices; tokens stay where preprocess wrote them. Packed rows have equal tokens and memory, but not
equal time: attention costs the square of each sample's length. `sampler.RowSampler` puts rows of similar cost into one step.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packs:
    """Which samples share a row: row i holds the samples order[starts[i]:starts[i + 1]], the longest first."""

    order: NDArray[np.int64]
    """A permutation of the samples: shape (samples,)."""
    starts: NDArray[np.int64]
    """Shape (rows + 1,), from 0 to the number of samples."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> NDArray[np.int64]:
        """The samples of one row: int64, shape (samples in the row,)."""
        return self.order[self.starts[number] : self.starts[number + 1]]

    def sums(self, values: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums a value of each sample (tokens or cost, shape (samples,)) over each row: float64, shape (rows,)."""
        return np.add.reduceat(values[self.order], self.starts[:-1], dtype=np.float64) if len(self) else np.zeros(0)


def pack(lengths: NDArray[np.int64], capacity: int, seed: int | None = None) -> Packs:
    """Pack all samples by best fit decreasing: each sample, longest first, joins the fullest row that still has room.

    `lengths` are tokens, shape (samples,); a row holds at most `capacity` tokens. Best fit decreasing needs at most 11/9
    of the fewest possible rows, plus a constant (Johnson et al. 1974, doi:10.1137/0203025). The same arguments give the
    same rows. A `seed` shuffles samples of equal length: the number of rows stays, but samples get other neighbors.
    Rows come out nearly sorted by length; `sampler.RowSampler` shuffles them.

    Raises ValueError naming the first sample that is shorter than one token or longer than a row.
    """
    lengths = np.asarray(lengths)
    _check_lengths(lengths, capacity)
    lengths = lengths.astype(np.int64)
    moves = _moves(np.bincount(lengths), capacity)
    row_of = _rows_of(moves, capacity, len(lengths))
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int64)
    return Packs(_argsort(capacity - lengths, seed)[_argsort(row_of)], starts)


def attention_cost(lengths: NDArray[np.int64], hidden_factor: float) -> NDArray[np.float64]:
    """Training cost of each sample under its own attention mask, in units of one token's linear layers.

    Let W be the linear weights of a layer, and d the width of attention (heads times head size). Forward, a token costs
    2 W FLOPs in the linear layers. Causal attention costs 2 d length for the average token of a sample (scores and values,
    half of them masked). Backward costs twice as much of both. So a sample costs length + length^2 / hidden_factor, with
    hidden_factor = W / d: the length at which attention costs as much as everything else. It is 12 times the hidden size
    in a GPT block, and 53,248 in Llama 3 8B. Source: Narayanan et al. 2021, arXiv:2104.04473, section 3; their s / 6h is
    s / 12h under a causal mask. Attention kernels reach a smaller share of the peak than matrix products, so a measured
    factor is smaller.

    Takes tokens, shape (samples,); returns float64 of the same shape. Raises ValueError unless hidden_factor is positive.
    """
    if not hidden_factor > 0:
        raise ValueError(f"hidden_factor={hidden_factor}: must be positive, about 12 times the hidden size")
    tokens = np.asarray(lengths, dtype=np.float64)
    return tokens + tokens * tokens / hidden_factor


def hidden_factor(model_config: Any) -> float:
    """The factor for `attention_cost` from a Hugging Face config: linear weights of a block divided by its attention width.

    For a mixture of experts, only the experts that a token passes count. The result depends only on the model's shape, so
    that a resumed run has the same order of rows.
    """
    text_config = model_config.get_text_config()
    hidden, heads = int(text_config.hidden_size), int(text_config.num_attention_heads)
    width = heads * int(getattr(text_config, "head_dim", None) or hidden // heads)
    key_value_width = width * int(getattr(text_config, "num_key_value_heads", None) or heads) // heads
    inner = int(getattr(text_config, "intermediate_size", None) or 4 * hidden)
    inner *= int(getattr(text_config, "num_experts_per_tok", None) or 1)
    return hidden * (2 * width + 2 * key_value_width + 3 * inner) / width


def _check_lengths(lengths: NDArray[np.int64], capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: must be at least 1 token")
    if lengths.ndim != 1 or (len(lengths) and not np.issubdtype(lengths.dtype, np.integer)):
        raise ValueError(f"lengths: must be one whole number per sample, got shape {lengths.shape} of {lengths.dtype}")
    wrong = (lengths < 1) | (lengths > capacity)
    if wrong.any():
        first = int(wrong.argmax())
        why = "is shorter than 1" if lengths[first] < 1 else f"is longer than capacity={capacity}"
        raise ValueError(f"sample {first}: its length of {lengths[first]} tokens {why}; drop or cut the sample first")


def _argsort(keys: NDArray[np.int64], seed: int | None = None) -> NDArray[np.int64]:
    """Stable argsort of keys from 0 to 2^32 - 1; with a seed, equal keys come in random order.

    It sorts 16 bits at a time, because numpy has a radix sort for 16-bit integers only and sorts wider ones much slower.
    """
    order = np.arange(len(keys)) if seed is None else np.random.default_rng(seed).permutation(len(keys))
    for shift in range(0, max(1, int(keys.max(initial=0)).bit_length()), 16):
        digit = (keys >> shift).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order


class _Move(NamedTuple):
    """Puts `samples_per_row` samples of one length into each of `rows` rows.

    These rows have room for `room` tokens before, and for `room_after` tokens afterwards.
    """

    room: int
    room_after: int
    rows: int
    samples_per_row: int


def _moves(counts: NDArray[np.int64], capacity: int) -> list[_Move]:
    """Best fit decreasing on counts alone: counts[length] is how many samples have that length. Longest samples first.

    Rows with equal room are interchangeable, so all samples of one length are placed together: the rows that fit best take
    room // length samples each, then the rows that fit next best, until no sample of this length is left. A million
    samples need a few thousand moves of some microseconds each.
    """
    rows_with_room = [0] * (capacity + 1)
    rooms: list[int] = []  # the values of `room` that any row has, ascending
    moves = []
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            best = bisect_left(rooms, length)
            room = rooms[best] if best < len(rooms) else capacity  # no row fits: open new ones
            samples_per_row = min(left, room // length)
            rows = left // samples_per_row
            if best < len(rooms):
                rows = min(rows, rows_with_room[room])
                rows_with_room[room] -= rows
                if not rows_with_room[room]:
                    del rooms[best]
            room_after = room - samples_per_row * length
            if room_after:
                if not rows_with_room[room_after]:
                    insort(rooms, room_after)
                rows_with_room[room_after] += rows
            left -= rows * samples_per_row
            moves.append(_Move(room, room_after, rows, samples_per_row))
    return moves


def _rows_of(moves: list[_Move], capacity: int, samples: int) -> NDArray[np.int64]:
    """The row number of each sample, samples counted longest first: int64, shape (samples,).

    For each value of `room` there is a queue of the rows with that room. All queues are slices of one array, `queues`:
    head[room] and tail[room] are where the next row is taken and added. The queue of a full `capacity` holds the new rows,
    numbered in the order in which they are opened.
    """
    sizes = np.zeros(capacity + 1, dtype=np.int64)  # how many rows ever enter each queue
    for room, room_after, rows, _ in moves:
        sizes[room_after] += rows
        if room == capacity:
            sizes[capacity] += rows
    ends = np.cumsum(sizes)
    head, tail = (ends - sizes).tolist(), (ends - sizes).tolist()
    queues = np.empty(int(sizes.sum()), dtype=np.int64)
    queues[head[capacity] :] = np.arange(sizes[capacity])
    row_of = np.empty(samples, dtype=np.int64)
    done = 0
    for room, room_after, rows, samples_per_row in moves:
        taken = queues[head[room] : head[room] + rows]
        head[room] += rows
        queues[tail[room_after] : tail[room_after] + rows] = taken
        tail[room_after] += rows
        row_of[done : done + rows * samples_per_row] = (
            taken if samples_per_row == 1 else np.repeat(taken, samples_per_row)
        )
        done += rows * samples_per_row
    return row_of
