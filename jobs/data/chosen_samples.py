"""Chooses the samples of a run's splits from its tokenized sets: what is held out, dropped and repeated."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from conf import datasets
from conf.schema_model import Data
from jobs.data import splits, token_dataset
from jobs.data.splits import SampleNumbers
from jobs.data.tokenized_set import TokenizedSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """The samples of each split, and those that are there twice. All are sample numbers across the split's sets."""

    train: SampleNumbers
    """With the repetitions that weights ask for."""
    validation: SampleNumbers
    duplicates: SampleNumbers
    """Training samples that are equal to an earlier one, and are kept."""
    overlap: SampleNumbers
    """Samples of the held-out set that are trained on."""
    compared: int
    """Samples among which duplicates were looked for."""
    all_held_out: bool
    """Whether validation takes all samples, because they are equal or parts of one row."""


def choose(training: Mapping[str, TokenizedSet], held_out: TokenizedSet | None, data: Data) -> Chosen:
    """The samples of each split."""
    folders = [item.folder for item in training.values()]
    hashes, origins = ([token_dataset.load_hashes(path, kind) for path in folders] for kind in ("hashes", "origins"))
    first = [0, *accumulate(map(len, hashes))]
    sets = splits.TrainingSets(np.concatenate(hashes), np.concatenate(origins), first)
    none = np.zeros(0, dtype=np.int64)
    if held_out is not None:
        held_out_hashes = token_dataset.load_hashes(held_out.folder)
        train, validation = np.arange(len(sets.hashes)), np.arange(len(held_out_hashes))
    else:
        train, validation = splits.split_held_out(sets, data.validation_fraction, data.seed)

    all_held_out = held_out is None and len(validation) > 0 and not len(train)
    compared = validation if all_held_out else train
    kept, duplicates = splits.split_duplicates(compared, sets.hashes)
    if data.drop_duplicates:
        log.info(f"dropped   {len(duplicates):,} samples that are equal to an earlier one")
        train, duplicates = train if all_held_out else kept, none
    overlap = none if held_out is None else splits.find_overlap(held_out_hashes, sets.hashes[train])
    train = splits.apply_weights(train, sets, datasets.training(data), data.seed)
    return Chosen(train, validation, duplicates, overlap, len(compared), all_held_out)
