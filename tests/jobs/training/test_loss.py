"""The fused loss equals plain cross entropy in value and gradients, and computes nothing that is not needed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jobs.data import batches
from jobs.distributed.process_group import World
from jobs.model import fused_cross_entropy
from jobs.training import loss
from tests.jobs.networks import adapted, check_equal, gradients, network, rows, whole

LENGTHS = [40, 3, 17, 29]
HEADS = {"untied": {}, "tied": {"tie_word_embeddings": True}}


def unfused_loss(model, batch):
    logits = model(input_ids=batch.input_ids).logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=batches.IGNORED, reduction="sum")


def loss_and_gradients(value, model):
    (value / 7).backward()  # a training step divides by a number of tokens
    return value.item(), gradients(model)


@pytest.fixture(params=[2**28, 97 * 16], ids=["one chunk", "chunks of 16 tokens"], autouse=True)
def chunk_size(request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cross_entropy, "CHUNK", request.param)


@pytest.mark.parametrize("tied", HEADS)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_fused_loss_equals_plain_cross_entropy(tied, dtype, rel) -> None:
    model, batch = network(dtype=dtype, **HEADS[tied]), whole(rows(LENGTHS))
    expected, expected_gradients = loss_and_gradients(unfused_loss(model, batch), model)
    assert fused_cross_entropy.fuse(model)
    value, actual = loss_and_gradients(loss.summed_cross_entropy(model, batch), model)
    assert value == pytest.approx(expected, rel=1e-6 if dtype is torch.float32 else 1e-5)
    check_equal(actual, expected_gradients, rel)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["frozen head", "adapted head"])
def test_fused_loss_equals_plain_cross_entropy_under_adapters(targets) -> None:
    model, batch = adapted(network(), targets), whole(rows(LENGTHS))
    expected, expected_gradients = loss_and_gradients(unfused_loss(model, batch), model)
    assert fused_cross_entropy.fuse(model)
    value, actual = loss_and_gradients(loss.summed_cross_entropy(model, batch), model)
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(actual, expected_gradients, 1e-6)
    assert model.get_base_model().model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: adapted(model, ["lm_head", "o_proj"])])
def test_smoothed_loss_equals_torchs(wrap) -> None:
    model, batch = wrap(network()), whole(rows(LENGTHS))
    logits = model(input_ids=batch.input_ids).logits[:, :-1].float().flatten(0, 1)
    targets = batch.labels[:, 1:].flatten()
    smoothed = F.cross_entropy(logits, targets, ignore_index=batches.IGNORED, reduction="sum", label_smoothing=0.3)
    expected, expected_gradients = loss_and_gradients(smoothed, model)
    lengths = np.array(LENGTHS)
    unfused = loss.training_losses(model, batch, lengths, smoothing=0.3)[0]
    assert fused_cross_entropy.fuse(model)
    for losses in (unfused, loss.training_losses(model, batch, lengths, smoothing=0.3)[0]):
        value, actual = loss_and_gradients(losses, model)
        assert value == pytest.approx(expected, rel=1e-6)
        check_equal(actual, expected_gradients, 1e-6)


def test_a_head_with_a_bias_learns_it() -> None:
    model, batch = network("phi"), whole(rows(LENGTHS))
    assert model.lm_head.bias is not None
    expected, expected_gradients = loss_and_gradients(unfused_loss(model, batch), model)
    assert fused_cross_entropy.fuse(model)
    value, actual = loss_and_gradients(loss.summed_cross_entropy(model, batch), model)
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(actual, expected_gradients, 1e-6)


@pytest.mark.parametrize("wrap", [lambda model: model, adapted, lambda model: adapted(model, ["lm_head", "o_proj"])])
def test_a_batch_without_trained_tokens_costs_nothing_and_gives_every_gradient(wrap) -> None:
    """Otherwise the other ranks would wait for the gradients of a rank with nothing to train."""
    model = wrap(network())
    assert fused_cross_entropy.fuse(model)
    value, actual = loss_and_gradients(loss.summed_cross_entropy(model, whole(rows(LENGTHS, trained=0.0))), model)
    assert value == 0
    assert all(not gradient.any() for gradient in actual.values())


def test_only_trained_tokens_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, seen = network(), whole(rows(LENGTHS)), []
    assert fused_cross_entropy.fuse(model)
    original = fused_cross_entropy._loss_and_grad
    monkeypatch.setattr(
        fused_cross_entropy, "_loss_and_grad", lambda logits, *rest: seen.append(len(logits)) or original(logits, *rest)
    )
    loss.summed_cross_entropy(model, batch)
    assert sum(seen) == (batch.labels[:, 1:] != batches.IGNORED).sum() < batch.input_ids.numel() / 2


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.1}),
    ],
)
def test_a_model_that_changes_its_logits_is_not_fused(kind, extra) -> None:
    model, batch = network(kind, "eager", **extra), whole(rows(LENGTHS))
    expected = unfused_loss(model, batch).item()
    assert not fused_cross_entropy.fuse(model)
    assert loss.summed_cross_entropy(model, batch).item() == pytest.approx(expected, rel=1e-6)


def test_a_fused_model_still_gives_logits() -> None:
    model, batch = network(), whole(rows(LENGTHS))
    before = model(input_ids=batch.input_ids).logits
    assert fused_cross_entropy.fuse(model)
    assert torch.equal(model(input_ids=batch.input_ids).logits, before)


def test_a_second_backward_is_refused() -> None:
    weight = nn.Parameter(torch.randn(97, 8))
    value = fused_cross_entropy.FusedCrossEntropy.apply(
        torch.randn(5, 8), weight, None, torch.arange(5), 0.0, True, False
    )
    value.backward(retain_graph=True)
    with pytest.raises(TypeError):
        value.backward()


def test_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = network(), []
    assert fused_cross_entropy.fuse(model)
    original = fused_cross_entropy._loss_and_grad
    monkeypatch.setattr(
        fused_cross_entropy, "_loss_and_grad", lambda *given: asked.append(given[2]) or original(*given)
    )
    with torch.no_grad():
        loss.summed_cross_entropy(model, whole(rows(LENGTHS)))
    assert not any(asked)


@pytest.mark.parametrize("ranks", [1, 3])
def test_held_out_loss_is_that_of_all_rows_on_any_number_of_ranks(ranks) -> None:
    model, all_rows = network(), rows(LENGTHS)
    expected = unfused_loss(model.eval(), whole(all_rows)).item()
    assert fused_cross_entropy.fuse(model)
    worlds = [World(rank, ranks, rank, ranks, torch.device("cpu")) for rank in range(ranks)]
    shares = [loss.evaluate(model, all_rows, 2, 0, world) for world in worlds]
    summed, tokens = sum(shares).tolist()
    assert summed == pytest.approx(expected, rel=1e-6)
    assert tokens == all_rows.label_counts.sum()
