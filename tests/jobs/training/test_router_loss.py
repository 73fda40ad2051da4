"""The router loss of config.json: trained as transformers trains it, or named in the log as off."""

import numpy as np
import pytest
import torch
from transformers.models.granitemoe import modeling_granitemoe

from conf.errors import ConfigError
from jobs.data import batches
from jobs.distributed.log_once import log_once
from jobs.model import fused_cross_entropy, router_loss
from jobs.training import loss
from tests.conftest import Compose
from tests.jobs import families
from tests.jobs.networks import check_equal, network, rows

pytestmark = pytest.mark.filterwarnings("ignore")
RECORDED = "router_logits" in modeling_granitemoe.GraniteMoePreTrainedModel._can_record_outputs
"""Whether this transformers returns the router logits of GraniteMoe; 5.17 did not, and its own loss fails."""
KINDS = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    pytest.param(
        "granitemoe", marks=pytest.mark.skipif(not RECORDED, reason="this transformers returns no router logits of it")
    ),
    "jamba",
    "phimoe",
    "ernie4_5_moe",
    "minimax",
]


def moe(kind: str, **values):
    extra = families.FAMILIES[kind][1] | {"output_router_logits": True, "router_aux_loss_coef": 0.3} | values
    model = network(kind, "eager", **extra)
    for name, value in model.named_parameters():
        value.requires_grad_("correction_bias" not in name)
    router_loss.attach(model)
    return model


def test_a_model_that_returns_no_router_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, all_rows = moe("granitemoe"), rows([30, 11])
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **inputs: forward(**inputs | {"output_router_logits": False}))
    batch = batches.collate(all_rows, np.arange(2), pad=0)
    with pytest.raises(
        ConfigError, match="^output_router_logits=true: .* no router logits of GraniteMoeForCausalLM. Install"
    ):
        loss.training_losses(model, batch, all_rows.lengths)
    model = moe("granitemoe", output_router_logits=False)  # what the message says
    assert loss.training_losses(model, batch, all_rows.lengths)[1] is None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_padded_batch_is_that_of_transformers(kind, fused) -> None:
    all_rows = rows([30, 11, 17])
    batch = batches.collate(all_rows, np.arange(3), pad=0)
    model = moe(kind, router_jitter_noise=0.0, input_jitter_noise=0.0)
    real = torch.arange(batch.input_ids.shape[1])[None] < torch.from_numpy(all_rows.lengths)[:, None]
    out = model(input_ids=batch.input_ids, attention_mask=real.long(), labels=batch.labels, use_cache=False)
    out.loss.backward()
    expected = all_gradients(model)
    if fused and not fused_cross_entropy.fuse(model):
        pytest.skip("the head of this family cannot be fused with the loss")
    summed, router = loss.training_losses(model, batch, all_rows.lengths)
    mean = summed / len(batch.trained)
    (mean + router).backward()
    assert router.item() == pytest.approx(0.3 * out.aux_loss.item(), rel=1e-5)
    assert (mean + router).item() == pytest.approx(out.loss.item(), rel=1e-5)
    check_equal(all_gradients(model), expected, 2e-3)


def all_gradients(model) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in model.named_parameters()}
    model.zero_grad()
    return found


def test_padding_does_not_change_the_router_loss() -> None:
    model, all_rows = moe("mixtral"), rows([30, 11, 17])
    wide, narrow = (batches.collate(all_rows, np.arange(3), pad=0, multiple=multiple) for multiple in (64, 1))
    values = [loss.training_losses(model, batch, all_rows.lengths)[1].item() for batch in (wide, narrow)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_held_out_loss_has_no_router_loss() -> None:
    model, batch = moe("mixtral"), batches.collate(rows([30, 11]), np.arange(2), pad=0)
    assert loss.summed_cross_entropy(model, batch).shape == ()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"output_router_logits": False}, "off: output_router_logits=false; set it to true in config.json to train it"),
        ({}, "router_aux_loss_coef=0.3 of config.json is trained"),
        ({"z_loss_coefficient": 0.5}, "z_loss_coefficient=0.5 of config.json is off"),
    ],
)
def test_the_log_says_whether_it_is_trained(values, line, capsys: pytest.CaptureFixture[str]) -> None:
    log_once.cache_clear()
    model = moe("mixtral", **values)
    assert line in capsys.readouterr().out
    assert (router_loss.attached(model) is None) == (values.get("output_router_logits") is False)


def test_a_model_without_experts_logs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log_once.cache_clear()
    model = network("llama")
    router_loss.attach(model)
    assert router_loss.attached(model) is None
    assert "router" not in capsys.readouterr().out


@pytest.mark.slow
def test_training_on_two_ranks_with_accumulation_equals_transformers(compose: Compose, tmp_path) -> None:
    cells = families.check(["qwen2_moe_aux", "granitemoe_aux"], ["full", "LoRA", "recomputed"], tmp_path, compose)
    granite = "right" if RECORDED else "late"
    assert [cell.verdict for cell in cells] == ["right"] * 3 + [granite] * 3, cells
