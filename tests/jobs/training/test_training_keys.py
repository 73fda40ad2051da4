"""Keys that change what is trained: each run against the same training in plain torch, with transformers' own parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup
from transformers.integrations.neftune import neftune_post_forward_hook

from conf.choices import Backend
from conf.schema import Config
from jobs.data import batches
from jobs.model import build
from jobs.training import loss
from launcher.submit import rewind
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FSDP, ZERO], ids=["fsdp", "zero3"])
def test_a_rate_that_changes_at_a_chosen_checkpoint(
    layout: dict[str, object], rows: Path, compose: Compose, tmp_path: Path
) -> None:
    """The new rate is below that of the embedding: the groups of the optimizer must not be sorted by their rates."""
    words = ["data.max_length=256", "train.save_every=2", "train.keep_checkpoints=9"]
    words += ["+train.learning_rates={embed_tokens: 1e-3}"]
    [config] = curves.runs(compose("model=tiny", *curves.SMALL, *words), rows / "data", tmp_path, {"run": layout})
    [whole] = curves.train_each([config], world=2)
    config.train.learning_rate, config.train.resume_step = 2e-4, 4
    rewind.apply(config)
    [lines] = curves.train_each([config], world=2)
    assert curves.losses(lines[:5]) == curves.losses(whole[:5])
    original = compose("model=tiny", *curves.SMALL, *words)
    expected = [loss for loss, _ in reference.curve(original, rows, 6, later=(4, 2e-4))]
    assert curves.losses(lines) == pytest.approx(expected, rel=1e-4)
    assert curves.losses(lines) != pytest.approx(curves.losses(whole), rel=1e-4)
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    new = get_cosine_with_min_lr_schedule_with_warmup
    assert rates[4:] == pytest.approx(
        _scheduled(new, 2e-4, num_warmup_steps=2, num_training_steps=6, min_lr_rate=0.1)[4:]
    )
    aside = Path(config.run_dir) / "checkpoints/replaced-1"
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-00000006"]
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == len(whole)


def _scheduled(make: Callable[..., Any], peak: float, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler, values = make(optimizer, **options), []
    for _ in range(6):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


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
