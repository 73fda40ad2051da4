"""Which rows a step trains on, and how they become batches."""

import numpy as np
import pytest
import torch

from conf.errors import DataError
from jobs.data import batches, token_dataset
from jobs.data.token_dataset import Part
from jobs.model import build
from jobs.training import loss


def arranged(tokens, trained, offsets, pack_into=None):
    """All samples of two parts, cut after the first third."""
    cut = len(offsets) // 3
    at = offsets[cut]
    parts = [
        Part(tokens[:at], trained[:at], offsets[: cut + 1]),
        Part(tokens[at:], trained[at:], offsets[cut:] - at),
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
    return arranged(tokens, trained, offsets)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 12), (1, 5), (2, 3), (3, 1), (4, 3)])
def test_ranks_share_a_step_without_overlap(rows, world_size, micro_batch):
    chosen = np.arange(12) % 10
    parts = [
        part for rank in range(world_size) for part in batches.micro_batches(chosen, micro_batch, rank, world_size)
    ]
    assert sorted(np.concatenate(parts)) == sorted(chosen)
    assert max(len(part) for part in parts) <= micro_batch


def test_a_batch_is_padded_on_the_right_and_masked(rows):
    made = batches.collate(rows, np.array([1, 2]), pad=99, multiple=4)
    assert made.input_ids.tolist() == [[1, 1, 99, 99], [2, 2, 2, 99]]
    assert made.labels.tolist() == [[-100, 1, -100, -100], [-100, 2, 2, -100]]
    assert made.input_ids.dtype is torch.int64
    assert made.trained.tolist() == [0, 4, 5]
    assert made.cu_seqlens is None  # a sample a row: causal attention alone keeps them apart


def test_packed_samples_begin_again_at_position_0_and_predict_nothing_across(rows):
    packed = batches.make_rows(rows.samples, rows.chosen, pack_into=10)
    (row,) = (number for number in range(len(packed)) if set(packed.packs.row(number)) == {0, 8})  # of 1 and 9 tokens
    made = batches.collate(packed, np.array([row]), pad=99, multiple=4)
    assert made.input_ids.tolist() == [[8] * 9 + [0] + [99, 99]]
    assert made.position_ids.tolist() == [[*range(9), 0, 0, 1]]
    assert made.labels.tolist() == [[-100] + [8] * 8 + [-100] * 3]
    assert made.trained.tolist() == list(range(8))
    assert packed.counts.sum() == rows.counts.sum()
    assert packed.lengths.max() == 10


def test_borders_of_packed_samples_go_over_all_rows_and_padding_is_a_sample_of_its_own(rows):
    packed = batches.make_rows(rows.samples, rows.chosen, pack_into=10)
    first, full = (
        next(number for number in range(len(packed)) if set(packed.packs.row(number)) == wanted)
        for wanted in ({0, 8}, {9})
    )
    made = batches.collate(packed, np.array([first, full]), pad=99, multiple=4)
    assert made.cu_seqlens.tolist() == [0, 9, 10, 12, 22, 24]
    assert made.cu_seqlens.dtype is torch.int32
    assert made.max_length == 10
    assert type(made.max_length) is int


def test_packed_rows_have_the_loss_of_their_samples_alone(compose):
    """The mean over samples in any arrangement; float32, so what differs is the order of sums."""
    config = compose("data.max_length=64")
    chance = np.random.default_rng(0)
    lengths = chance.integers(3, 40, size=24)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens, trained = (
        chance.integers(3, 1000, size=offsets[-1]).astype(np.int32),
        chance.integers(0, 2, size=offsets[-1]),
    )
    network = build.build(config)
    sums = []
    for pack_into in (None, 64):
        packed = arranged(tokens, trained.astype(np.uint8), offsets, pack_into)
        gradient = torch.zeros(())
        total = 0.0
        network.zero_grad()
        for row in range(len(packed)):
            value = loss.summed(network, batches.collate(packed, np.array([row]), pad=0))
            value.backward()
            total += value.item()
        gradient = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
        sums.append((total, gradient.item(), len(packed)))
    assert sums[1][2] < sums[0][2]
    assert sums[1][:2] == pytest.approx(sums[0][:2], rel=1e-5)


def test_counts_leave_out_a_trained_first_token():
    trained, offsets = np.array([1, 1, 0, 1], dtype=np.uint8), np.array([0, 2, 4])
    found = token_dataset.from_parts([Part(np.arange(4, dtype=np.int32), trained, offsets)])
    assert found.labels.tolist() == [1, 1]


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(DataError, match="preprocess"):
        batches.load_split(tmp_path, "train")
