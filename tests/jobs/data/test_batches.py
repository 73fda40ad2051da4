"""Rows of a split, micro batches of ranks, and padded batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import DataError
from jobs.data import batches, token_dataset
from jobs.data.token_dataset import Part
from jobs.model import build
from jobs.training import loss


def rows_of(tokens, trained, offsets, pack_into=None):
    """Rows of all samples, in two parts: the first third of the samples, and the rest."""
    cut = len(offsets) // 3
    split = offsets[cut]
    parts = [
        Part(tokens[:split], trained[:split], offsets[: cut + 1]),
        Part(tokens[split:], trained[split:], offsets[cut:] - split),
    ]
    return batches.make_rows(token_dataset.from_parts(parts), np.arange(len(offsets) - 1), pack_into)


@pytest.fixture
def rows():
    """Ten rows of lengths 1 to 10; row i is i + 1 tokens of value i, all but the first trained."""
    lengths = np.arange(1, 11)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.repeat(np.arange(10, dtype=np.int32), lengths)
    trained = np.ones(len(tokens), dtype=np.uint8)
    trained[offsets[:-1]] = 0
    return rows_of(tokens, trained, offsets)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 12), (1, 5), (2, 3), (3, 1), (4, 3)])
def test_ranks_share_a_step_without_overlap(rows, world_size, micro_batch) -> None:
    chosen = np.arange(12) % 10
    parts = [
        part for rank in range(world_size) for part in batches.micro_batches(chosen, micro_batch, rank, world_size)
    ]
    assert sorted(np.concatenate(parts)) == sorted(chosen)
    assert max(len(part) for part in parts) <= micro_batch


def test_a_batch_is_padded_on_the_right_and_masked(rows) -> None:
    batch = batches.collate(rows, np.array([1, 2]), pad=99, multiple=4)
    assert batch.input_ids.tolist() == [[1, 1, 99, 99], [2, 2, 2, 99]]
    assert batch.labels.tolist() == [[-100, 1, -100, -100], [-100, 2, 2, -100]]
    assert batch.input_ids.dtype is torch.int64
    assert batch.trained.tolist() == [0, 4, 5]
    assert batch.cu_seqlens is None  # one sample per row: causal attention needs no boundaries


def test_packed_samples_restart_at_position_0_and_do_not_predict_each_other(rows) -> None:
    packed = batches.make_rows(rows.samples, rows.chosen, pack_into=10)
    (row,) = (number for number in range(len(packed)) if set(packed.packs.row(number)) == {0, 8})  # of 1 and 9 tokens
    batch = batches.collate(packed, np.array([row]), pad=99, multiple=4)
    assert batch.input_ids.tolist() == [[8] * 9 + [0] + [99, 99]]
    assert batch.position_ids.tolist() == [[*range(9), 0, 0, 1]]
    assert batch.labels.tolist() == [[-100] + [8] * 8 + [-100] * 3]
    assert batch.trained.tolist() == list(range(8))
    assert packed.label_counts.sum() == rows.label_counts.sum()
    assert packed.lengths.max() == 10


def test_cu_seqlens_cover_all_rows_and_padding_is_a_sample_of_its_own(rows) -> None:
    packed = batches.make_rows(rows.samples, rows.chosen, pack_into=10)
    first, full = (
        next(number for number in range(len(packed)) if set(packed.packs.row(number)) == wanted)
        for wanted in ({0, 8}, {9})
    )
    batch = batches.collate(packed, np.array([first, full]), pad=99, multiple=4)
    assert batch.cu_seqlens.tolist() == [0, 9, 10, 12, 22, 24]
    assert batch.cu_seqlens.dtype is torch.int32
    assert batch.max_length == 10
    assert type(batch.max_length) is int


def test_packing_does_not_change_loss_and_gradient(compose) -> None:
    """In float32, so only the order of sums differs."""
    config = compose("data.max_length=64")
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, size=24)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens, trained = (
        rng.integers(3, 1000, size=offsets[-1]).astype(np.int32),
        rng.integers(0, 2, size=offsets[-1]),
    )
    network = build.build(config)
    sums = []
    for pack_into in (None, 64):
        packed = rows_of(tokens, trained.astype(np.uint8), offsets, pack_into)
        gradient = torch.zeros(())
        total = 0.0
        network.zero_grad()
        for row in range(len(packed)):
            value = loss.summed_cross_entropy(network, batches.collate(packed, np.array([row]), pad=0))
            value.backward()
            total += value.item()
        gradient = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
        sums.append((total, gradient.item(), len(packed)))
    assert sums[1][2] < sums[0][2]
    assert sums[1][:2] == pytest.approx(sums[0][:2], rel=1e-5)


def test_a_trained_first_token_is_not_counted() -> None:
    trained, offsets = np.array([1, 1, 0, 1], dtype=np.uint8), np.array([0, 2, 4])
    dataset = token_dataset.from_parts([Part(np.arange(4, dtype=np.int32), trained, offsets)])
    assert dataset.label_counts.tolist() == [1, 1]


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="preprocess"):
        batches.load_split(tmp_path, "train")
