"""Keys that change what is trained: each run against the same training in plain torch, with transformers' own parts."""

from pathlib import Path

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from conf.choices import Backend
from conf.schema import Config
from jobs.data import batches
from jobs.model import build
from jobs.training import loss
from tests.conftest import Compose
from tests.jobs import curves, ranks, reference

FSDP: dict[str, object] = {}
ZERO: dict[str, object] = {"parallel.backend": Backend.zero, "parallel.zero_stage": 3, "parallel.name": "zero3"}
ALL = [
    "train.label_smoothing=0.2", "+train.learning_rates={embed_tokens: 1e-4, layers.3: 6e-3}",
    "train.unfrozen=[embed_tokens,layers.2,layers.3,norm]", "data.order=length", "data.pad_to_max=true", "data.max_length=256",
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("rows") / "run"
    ranks.run(f"run_dir={run}", *curves.SMALL, "data.max_length=256", "jobs=[preprocess]")
    return run


@pytest.mark.slow
def test_all_keys_together_equal_plain_torch(rows: Path, compose: Compose, tmp_path: Path) -> None:
    config = compose("model=tiny", *curves.SMALL, *ALL)
    trained = curves.train_each(curves.runs(config, rows / "data", tmp_path, {"fsdp": FSDP, "zero3": ZERO}), world=2)
    expected = [loss for loss, _ in reference.curve(config, rows, 6)]
    plain = [loss for loss, _ in reference.curve(compose("model=tiny", *curves.SMALL, "data.max_length=256"), rows, 6)]
    for lines in trained:
        assert curves.losses(lines) == pytest.approx(expected, rel=2e-3)
        assert curves.losses(lines) != pytest.approx(plain, rel=2e-3)  # the keys do change the training


def _noisy_losses(config: Config, rows_folder: Path) -> list[float]:
    """Losses of one process with transformers' own hook, in the same order of random numbers."""
    rows = batches.load_split(rows_folder, "train")
    network = build.build(config).train()
    embedding = network.get_input_embeddings()
    embedding.neftune_noise_alpha = config.train.neftune_alpha
    embedding.register_forward_hook(neftune_post_forward_hook)
    order, values = batches.training_order(rows, config, 1.0), []
    for step in range(2):
        torch.manual_seed(hash((config.train.seed, step, 0)) % 2**63)
        batch = batches.collate(rows, order.rows_of(step), pad=0)
        value = loss.summed_cross_entropy(network, batch) / len(batch.trained)
        values.append(value.item())
    return values


@pytest.mark.slow
def test_noise_on_embeddings_is_that_of_a_trainer(rows: Path, compose: Compose, tmp_path: Path) -> None:
    words = [
        "train.neftune_alpha=15",
        "train.micro_batch=16",
        "train.steps=2",
        "train.learning_rate=0",
        "data.max_length=256",
    ]
    config = compose("model=tiny", *curves.SMALL, *words)
    [lines] = curves.train_each(curves.runs(config, rows / "data", tmp_path, {"fsdp": FSDP}), world=1)
    assert curves.losses(lines) == pytest.approx(_noisy_losses(config, rows / "data"), rel=1e-5)
    config.train.neftune_alpha = 0.0
    assert curves.losses(lines) != pytest.approx(_noisy_losses(config, rows / "data"), rel=1e-4)
