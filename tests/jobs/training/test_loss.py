"""The fused loss against plain cross entropy: value and gradients, and what it must never compute."""

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


def plainly(made, batch):
    logits = made(input_ids=batch.input_ids).logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=batches.IGNORED, reduction="sum")


def taught(value, made):
    (value / 7).backward()  # as a step does, which divides by a count of tokens
    return value.item(), gradients(made)


@pytest.fixture(params=[2**28, 97 * 16], ids=["one chunk", "chunks of 16 tokens"], autouse=True)
def chunk(request, monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "CHUNK", request.param)


@pytest.mark.parametrize("tied", HEADS)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_fused_loss_equals_plain_cross_entropy(tied, dtype, rel):
    made, batch = network(dtype=dtype, **HEADS[tied]), whole(rows(LENGTHS))
    expected, slopes = taught(plainly(made, batch), made)
    assert fused_cross_entropy.fuse(made)
    value, found = taught(loss.summed(made, batch), made)
    assert value == pytest.approx(expected, rel=1e-6 if dtype is torch.float32 else 1e-5)
    check_equal(found, slopes, rel)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["frozen head", "adapted head"])
def test_fused_loss_equals_plain_cross_entropy_under_adapters(targets):
    made, batch = adapted(network(), targets), whole(rows(LENGTHS))
    expected, slopes = taught(plainly(made, batch), made)
    assert fused_cross_entropy.fuse(made)
    value, found = taught(loss.summed(made, batch), made)
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(found, slopes, 1e-6)
    assert made.get_base_model().model.embed_tokens.weight.grad is None


def test_a_head_with_a_bias_learns_it():
    made, batch = network("phi"), whole(rows(LENGTHS))
    assert made.lm_head.bias is not None
    expected, slopes = taught(plainly(made, batch), made)
    assert fused_cross_entropy.fuse(made)
    value, found = taught(loss.summed(made, batch), made)
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(found, slopes, 1e-6)


@pytest.mark.parametrize("wrap", [lambda made: made, adapted, lambda made: adapted(made, ["lm_head", "o_proj"])])
def test_a_batch_without_trained_tokens_costs_nothing_and_gives_every_gradient(wrap):
    """Else a rank whose rows train nothing would leave the others waiting for its gradients."""
    made = wrap(network())
    assert fused_cross_entropy.fuse(made)
    value, found = taught(loss.summed(made, whole(rows(LENGTHS, trained=0.0))), made)
    assert value == 0
    assert all(not gradient.any() for gradient in found.values())


def test_only_trained_tokens_reach_the_head(monkeypatch):
    made, batch, seen = network(), whole(rows(LENGTHS)), []
    assert fused_cross_entropy.fuse(made)
    scored = fused_cross_entropy._scored
    monkeypatch.setattr(
        fused_cross_entropy, "_scored", lambda logits, *rest: seen.append(len(logits)) or scored(logits, *rest)
    )
    loss.summed(made, batch)
    assert sum(seen) == (batch.labels[:, 1:] != batches.IGNORED).sum() < batch.input_ids.numel() / 2


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.1}),
    ],
)
def test_a_model_that_changes_its_logits_keeps_the_plain_way(kind, extra):
    made, batch = network(kind, "eager", **extra), whole(rows(LENGTHS))
    expected = plainly(made, batch).item()
    assert not fused_cross_entropy.fuse(made)
    assert loss.summed(made, batch).item() == pytest.approx(expected, rel=1e-6)


def test_a_fused_model_still_gives_logits():
    made, batch = network(), whole(rows(LENGTHS))
    before = made(input_ids=batch.input_ids).logits
    assert fused_cross_entropy.fuse(made)
    assert torch.equal(made(input_ids=batch.input_ids).logits, before)


def test_a_second_backward_is_refused():
    weight = nn.Parameter(torch.randn(97, 8))
    value = fused_cross_entropy.Summed.apply(torch.randn(5, 8), weight, None, torch.arange(5), True, False)
    value.backward(retain_graph=True)
    with pytest.raises(TypeError):
        value.backward()


def test_evaluation_makes_no_gradients(monkeypatch):
    made, asked = network(), []
    assert fused_cross_entropy.fuse(made)
    scored = fused_cross_entropy._scored
    monkeypatch.setattr(fused_cross_entropy, "_scored", lambda *given: asked.append(given[2]) or scored(*given))
    with torch.no_grad():
        loss.summed(made, whole(rows(LENGTHS)))
    assert not any(asked)


@pytest.mark.parametrize("ranks", [1, 3])
def test_held_out_loss_is_that_of_all_rows_on_any_number_of_ranks(ranks):
    made, found = network(), rows(LENGTHS)
    expected = plainly(made.eval(), whole(found)).item()
    assert fused_cross_entropy.fuse(made)
    worlds = [World(rank, ranks, rank, ranks, torch.device("cpu")) for rank in range(ranks)]
    shares = [loss.held_out(made, found, 2, 0, world) for world in worlds]
    summed, tokens = sum(shares).tolist()
    assert summed == pytest.approx(expected, rel=1e-6)
    assert tokens == found.counts.sum()
