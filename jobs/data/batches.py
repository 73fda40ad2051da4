"""Token rows as preprocess chose them: what a row holds, and the batches that a rank gets of a step's rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from conf.errors import DataError, Problem
from conf.files import read_json
from conf.schema import Config
from jobs.data import token_dataset as samples
from jobs.data.packing import Packs, attention_cost, pack
from jobs.data.sampler import Order
from jobs.data.token_dataset import Samples

IGNORED = -100
"""Label of a token that is not trained; cross_entropy's own."""


@dataclass(frozen=True)
class Rows:
    """One split: row i holds the samples chosen[packs.row(i)], one or several.

    `chosen` are sample numbers, int64 of shape (samples of the split,); `lengths` and `counts` are the tokens and the
    trained labels of each row, int64 of shape (rows,).
    """

    samples: Samples
    chosen: NDArray[np.int64]
    packs: Packs
    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.packs)

    def costs(self, hidden_factor: float) -> NDArray[np.float64]:
        """What each row takes to train, in tokens without attention: float64 of shape (rows,); see `attention_cost`."""
        return self.packs.sums(attention_cost(self.samples.lengths[self.chosen], hidden_factor))


def read(folder: Path, split: str, pack_into: int | None = None) -> Rows:
    """Open a split of RUN/data: a sample a row, or packed into rows of at most `pack_into` tokens.

    Raises DataError where preprocess has not completed, or its tokens have been deleted.
    """
    about = read_json(folder / "data.json")
    if about is None:
        raise DataError(
            Problem("data", folder, "is not there or not whole: run the preprocess job first (pipeline=preprocess)")
        )
    sets = [folder / "sets" / name for name in about["splits"][split]]
    for one in sets:
        if not samples.is_whole(one):
            raise DataError(
                Problem("data", one, f"its tokens at {one.resolve()} are gone: delete {folder}, and preprocess again")
            )
    return arrange(samples.read(sets), np.load(folder / f"{split}.npy"), pack_into)


def arrange(found: Samples, chosen: NDArray[np.int64], pack_into: int | None = None) -> Rows:
    """Rows over these samples; what is packed together depends on their lengths alone."""
    lengths, alone = found.lengths[chosen], np.arange(len(chosen) + 1)
    packs = Packs(alone[:-1], alone) if pack_into is None else pack(lengths, pack_into)
    sums = (packs.sums(values).astype(np.int64) for values in (lengths, found.labels[chosen]))
    return Rows(found, chosen, packs, *sums)


def ordered(rows: Rows, config: Config, hidden_factor: float) -> Order:
    """The order of training that the config asks for; a function of rows, seed and global batch, not of the ranks."""
    asked = config.data.order.name
    kind = asked if asked != "auto" else "balanced" if config.data.packing else "random"
    return Order(rows.costs(hidden_factor), config.train.global_batch, config.data.seed, kind)


def batch(
    rows: Rows,
    chosen: NDArray[np.int64],
    pad: int,
    multiple: int = 8,
    device: torch.device | str = "cpu",
    share: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Rows padded on the right to the longest, rounded up: `input_ids` and `labels`, int64 of shape (rows, length).

    `trained` are the places, all rows laid end to end, whose next token is trained: int64 of shape (trained tokens,).
    Under causal attention padding on the right reaches no real token, so no mask is needed. Where a row holds several
    samples, attention is kept inside them by `position_ids`, which begin again at each, or by `cu_seqlens` and `max_length`:
    their borders, rows end to end, int32 of shape (samples + 1,), and the longest, an int, so that no GPU is waited for.

    `share`: (which, of how many) equal stretches of every row's tokens. What is said of tokens is then of that stretch, with
    `position_ids` in any case and one label more, that of the next stretch's first token; the borders are of whole rows.
    """
    multiple *= share[1]
    length = max(1, -(-int(rows.lengths[chosen].max(initial=1)) // multiple)) * multiple
    ids = np.full((len(chosen), length), pad, dtype=np.int64)
    labels = np.full((len(chosen), length), IGNORED, dtype=np.int64)
    positions = np.tile(np.arange(length), (len(chosen), 1))
    packed = False
    for line, row in enumerate(chosen):
        at, inside = 0, rows.packs.row(row)
        packed |= len(inside) > 1
        for sample in rows.chosen[inside].tolist():
            tokens, trained = rows.samples[sample]
            end = at + len(tokens)
            ids[line, at:end] = tokens
            labels[line, at:end] = np.where(trained, tokens, IGNORED)
            labels[line, at] = IGNORED
            positions[line, at:] = np.arange(length - at)
            at = end
        positions[line, at:] = np.arange(length - at)  # padding is a sample of its own
    made: dict[str, Any] = {"input_ids": ids, "labels": labels, "position_ids": positions}
    longest = {}
    if share[1] > 1:
        made = _stretch(made, *share)
    elif not packed:
        del made["position_ids"]
    made["trained"] = _trained(made["labels"], made["input_ids"].shape[1])
    if packed:
        borders = np.append(np.flatnonzero(positions.ravel() == 0), positions.size).astype(np.int32)
        made["cu_seqlens"] = borders
        longest = {"max_length": int(np.diff(borders).max())}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in made.items()}
    return {name: _moved(value, torch.device(device)) for name, value in tensors.items()} | longest


def _stretch(whole: dict[str, NDArray[np.int64]], which: int, count: int) -> dict[str, NDArray[np.int64]]:
    size = whole["input_ids"].shape[1] // count
    begin, end = which * size, (which + 1) * size
    return {name: value[:, begin : end + (name == "labels")] for name, value in whole.items()}


def _trained(labels: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Places of tokens whose next one is trained; labels, one more than `length` or as many, end where nothing follows."""
    following = np.pad(labels[:, 1:], ((0, 0), (0, length + 1 - labels.shape[1])), constant_values=IGNORED)
    return np.flatnonzero(following != IGNORED)


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def micro_batches(
    chosen: NDArray[np.int64], micro_batch: int, rank: int, world_size: int
) -> Iterator[NDArray[np.int64]]:
    """This rank's rows, one micro batch after the other; ranks hold rows of like length at the same time."""
    for start in range(rank * micro_batch, len(chosen), micro_batch * world_size):
        yield chosen[start : start + micro_batch]
