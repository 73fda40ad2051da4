"""Opens one split of the preprocessed data as training rows, and makes padded batches of them."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from conf.errors import DataError, Problem
from conf.files import read_json
from conf.schema import Config
from jobs.data import token_dataset
from jobs.data.packing import Packs, attention_cost, pack
from jobs.data.sampler import OrderKind, RowSampler
from jobs.data.token_dataset import TokenDataset

IGNORED = -100
"""Label of a token that is not trained: the default `ignore_index` of torch's cross_entropy."""


@dataclass(frozen=True)
class Rows:
    """The training rows of one split. Row i holds the samples chosen[packs.row(i)]: one sample, or several if packed."""

    samples: TokenDataset
    chosen: NDArray[np.int64]
    """Numbers of the split's samples in `samples`: shape (samples of the split,)."""
    packs: Packs
    lengths: NDArray[np.int64]
    """Tokens of each row: shape (rows,)."""
    label_counts: NDArray[np.int64]
    """Trained labels of each row: shape (rows,)."""

    def __len__(self) -> int:
        return len(self.packs)

    def costs(self, hidden_factor: float) -> NDArray[np.float64]:
        """Training cost of each row: float64, shape (rows,), in the unit of `attention_cost`."""
        return self.packs.sums(attention_cost(self.samples.lengths[self.chosen], hidden_factor))


def load_split(folder: Path, split: str, pack_into: int | None = None) -> Rows:
    """Open a split ("train" or "validation") of RUN/data: one sample per row, or rows of at most `pack_into` tokens.

    Raises DataError if the preprocess job has not completed, or if the tokens in the cache were deleted.
    """
    description = read_json(folder / "data.json")
    if description is None:
        raise DataError(
            Problem("data", folder, "is missing or incomplete: run the preprocess job first (pipeline=preprocess)")
        )
    sets = [folder / "sets" / name for name in description["splits"][split]]
    for path in sets:
        if not token_dataset.is_complete(path):
            raise DataError(
                Problem(
                    "data",
                    path,
                    f"tokens at {path.resolve()} were deleted. To preprocess again: "
                    f"rm -r {shlex.quote(str(folder))} {shlex.quote(str(folder.parent / 'jobs/preprocess'))}, "
                    f"then muster resume {shlex.quote(str(folder.parent))}",
                )
            )
    return make_rows(token_dataset.open_sets(sets), np.load(folder / f"{split}.npy"), pack_into)


def make_rows(samples: TokenDataset, chosen: NDArray[np.int64], pack_into: int | None = None) -> Rows:
    """Rows of the chosen samples. Which samples share a row depends only on their lengths."""
    lengths = samples.lengths[chosen]
    if pack_into is None:
        numbers = np.arange(len(chosen) + 1)
        packs = Packs(numbers[:-1], numbers)
    else:
        packs = pack(lengths, pack_into)
    row_lengths = packs.sums(lengths).astype(np.int64)
    row_labels = packs.sums(samples.label_counts[chosen]).astype(np.int64)
    return Rows(samples, chosen, packs, row_lengths, row_labels)


def unpacked(rows: Rows) -> Rows:
    """Rows of the same samples, one in each."""
    return make_rows(rows.samples, rows.chosen)


def training_order(rows: Rows, config: Config, hidden_factor: float) -> RowSampler:
    """The order of rows that data.order asks for. It depends on rows, seed and global batch, never on the ranks."""
    name = config.data.order.name
    if name == "auto":
        name = "balanced" if config.data.packing else "random"
    kind = cast(OrderKind, name)  # RowSampler checks it
    return RowSampler(rows.costs(hidden_factor), config.train.global_batch, config.data.seed, kind)


@dataclass
class Batch:
    """One micro batch, or one rank's part of it under context parallelism.

    Rows are padded on the right to the same length. Causal attention never reads the padding from a real token, so no
    attention mask is needed. If a row holds several samples, `position_ids` (restart at 0 in each sample) or `cu_seqlens`
    with `max_length` keep attention inside each sample.
    """

    input_ids: torch.Tensor
    """int64, shape (rows, length)."""
    labels: torch.Tensor
    """int64, shape (rows, length), IGNORED where a token is not trained. A context-parallel part has one column more: the
    label of the first token of the next part."""
    trained: torch.Tensor
    """Positions in the flattened batch whose next token is trained: int64, shape (trained tokens,). Computed on the CPU,
    because finding them on the GPU would make the CPU wait for it."""
    position_ids: torch.Tensor | None = None
    """int64, shape (rows, length); None if no row is packed and there is no context parallelism."""
    cu_seqlens: torch.Tensor | None = None
    """Packed rows only: cumulative sample lengths over all rows, int32, shape (samples + 1,). They always describe whole
    rows, also in a context-parallel part."""
    max_length: int | None = None
    """Packed rows only: tokens of the longest sample. An int, because reading it from a GPU tensor would wait for the GPU."""


def collate(
    rows: Rows,
    chosen: NDArray[np.int64],
    pad: int,
    *,
    multiple: int = 8,
    device: torch.device | str = "cpu",
    context_part: tuple[int, int] = (0, 1),
    at_least: int = 1,
) -> Batch:
    """Pad these rows on the right with token `pad` and make them a Batch on `device`.

    The length is that of the longest row, but `at_least` so many tokens, rounded up to `multiple` (times the number of
    context-parallel ranks).
    `context_part` is (index, count) of the context-parallel part: each rank gets an equal, contiguous part of every row.
    """
    index, count = context_part
    multiple *= count
    length = max(1, -(-int(rows.lengths[chosen].max(initial=at_least)) // multiple)) * multiple
    ids, labels, positions = _padded(rows, chosen, pad, length)
    cu_seqlens = max_length = None
    if any(len(rows.packs.row(row)) > 1 for row in chosen):
        # padding begins at position 0 too, so it counts as a sample of its own
        cu_seqlens = np.append(np.flatnonzero(positions.ravel() == 0), positions.size).astype(np.int32)
        max_length = int(np.diff(cu_seqlens).max())
    begin, end = index * length // count, (index + 1) * length // count
    ids, labels = ids[:, begin:end], labels[:, begin : end + 1]

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return _to_device(torch.from_numpy(np.ascontiguousarray(array)), torch.device(device))

    return Batch(
        input_ids=tensor(ids),
        labels=tensor(labels),
        trained=tensor(_trained_positions(labels, end - begin)),
        position_ids=None if cu_seqlens is None and count == 1 else tensor(positions[:, begin:end]),
        cu_seqlens=None if cu_seqlens is None else tensor(cu_seqlens),
        max_length=max_length,
    )


def _padded(
    rows: Rows, chosen: NDArray[np.int64], pad: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(token ids, labels, positions), each int64 of shape (rows, length). Positions restart at 0 in each sample."""
    ids = np.full((len(chosen), length), pad, dtype=np.int64)
    labels = np.full((len(chosen), length), IGNORED, dtype=np.int64)
    positions = np.tile(np.arange(length), (len(chosen), 1))
    for line, row in enumerate(chosen):
        begin = 0
        for sample in rows.chosen[rows.packs.row(row)].tolist():
            tokens, trained = rows.samples[sample]
            end = begin + len(tokens)
            ids[line, begin:end] = tokens
            labels[line, begin:end] = np.where(trained, tokens, IGNORED)
            labels[line, begin] = IGNORED  # no token of this sample predicts its first token
            positions[line, begin:] = np.arange(length - begin)
            begin = end
        positions[line, begin:] = np.arange(length - begin)  # padding is a sample of its own
    return ids, labels, positions


def _trained_positions(labels: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Positions in the flattened (rows, length) whose next token is trained; `labels` has `length` or `length` + 1 columns."""
    targets = np.pad(labels[:, 1:], ((0, 0), (0, length + 1 - labels.shape[1])), constant_values=IGNORED)
    return np.flatnonzero(targets != IGNORED)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def micro_batches(
    chosen: NDArray[np.int64], micro_batch: int, rank: int, world_size: int
) -> Iterator[NDArray[np.int64]]:
    """Yield this rank's rows of a step, one micro batch at a time.

    Consecutive micro batches go to consecutive ranks. `chosen` is sorted by cost, so all ranks process rows of similar
    cost at the same time.
    """
    for start in range(rank * micro_batch, len(chosen), micro_batch * world_size):
        yield chosen[start : start + micro_batch]
