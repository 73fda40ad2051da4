"""Every way of attention that runs on CPUs gives a packed sample what it gets alone; and which way is chosen, with the reason."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, masking_utils

from conf.choices import Attention
from conf.errors import ConfigError
from jobs.data import batches as data
from jobs.model import attention, attention_kernels, build, fused_cross_entropy
from jobs.training import loss
from tests.jobs.networks import SMALL, check_equal, gradients, network, rows, whole

LENGTHS = [19, 30, 7, 1, 12, 25, 3]
WAYS = ["muster_varlen", "sdpa", "eager"]
LLAMA8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


def taught(made, *batches):
    """Loss and gradients of all batches."""
    values = [loss.summed(made, batch) for batch in batches]
    torch.stack(values).sum().backward()
    return sum(value.item() for value in values), gradients(made)


def alone(found):
    return [data.collate(found, np.array([row]), pad=0) for row in range(len(found))]


@pytest.fixture
def no_masks(monkeypatch):
    """Fails where transformers builds a mask, or looks for packed rows, which on GPUs waits for the GPU."""

    def refused(*_, **__):
        raise AssertionError("a mask was built")

    for name in ("sdpa_mask", "eager_mask", "find_packed_sequence_indices"):
        monkeypatch.setattr(masking_utils, name, refused)
    monkeypatch.setattr(
        masking_utils.AttentionMaskInterface, "_global_mapping", dict.fromkeys(["sdpa", "eager"], refused)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_packed_rows_equal_a_sample_a_row(way, kind):
    extra = {"llama": {}, "qwen3": {"head_dim": 24}, "mistral": {"sliding_window": 9}}[kind]
    expected, slopes = taught(network(kind, "eager", **extra), *alone(rows(LENGTHS)))
    packed = rows(LENGTHS, pack_into=40)
    assert len(packed) < len(LENGTHS) / 2
    value, found = taught(network(kind, way, **extra), whole(packed))
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(found, slopes, 1e-5)


@pytest.mark.parametrize("way", ["muster_cudnn", "muster_varlen"])
@pytest.mark.parametrize("window", [None, 9])
def test_padded_rows_equal_transformers_own(way, window):
    batch = whole(rows(LENGTHS))
    expected, slopes = taught(network("mistral", "eager", sliding_window=window), batch)
    value, found = taught(network("mistral", way, sliding_window=window), batch)
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(found, slopes, 1e-5)


@pytest.mark.parametrize("packed", [None, 40])
def test_no_mask_is_built(packed, no_masks):
    found = rows(LENGTHS, packed)
    made = network(attention="muster_varlen" if packed else "muster_cudnn")
    assert fused_cross_entropy.fuse(made)
    taught(made, whole(found))
    with pytest.raises(AssertionError, match="a mask was built"):
        taught(network(attention="sdpa"), whole(found))


def test_dropout_of_attention_is_kept():
    torch.manual_seed(0)
    query = torch.randn(1, 4, 16, 8)
    borders = torch.tensor([0, 10, 16], dtype=torch.int32)
    ways = [
        attention_kernels.attend(None, query, query, query, None, dropout=rate, cu_seq_lens_q=borders)
        for rate in (0.0, 0.5)
    ]
    assert ways[0][0].shape == ways[1][0].shape == (1, 16, 4, 8)
    assert not torch.equal(ways[0][0], ways[1][0])


def llama(**extra):
    return AutoConfig.for_model("llama", **(LLAMA8B | extra))


@pytest.mark.parametrize(
    ("words", "shape", "capability", "expected"),
    [
        ([], llama(), (9, 0), Attention.cudnn),
        ([], llama(), (10, 0), Attention.cudnn),
        ([], llama(), (8, 0), Attention.sdpa),
        ([], llama(), None, Attention.sdpa),
        (["train.precision=fp32"], llama(), (9, 0), Attention.sdpa),
        (["data.packing=true"], llama(), (9, 0), Attention.varlen),
        (["data.packing=true"], llama(), (8, 0), Attention.varlen),
        (["data.packing=true"], llama(), None, Attention.varlen),
        (["data.packing=true", "train.precision=fp32"], llama(), (9, 0), Attention.sdpa),
        (["data.packing=true"], llama(attention_dropout=0.1), (9, 0), Attention.sdpa),
        (["data.packing=true"], llama(head_dim=100), (9, 0), Attention.sdpa),
        ([], AutoConfig.for_model("deepseek_v3"), (9, 0), Attention.sdpa),
        ([], AutoConfig.for_model("gemma2"), None, Attention.eager),
        ([], AutoConfig.for_model("gpt_oss"), None, Attention.eager),
    ],
)
def test_auto_takes_the_best_way_and_says_why(compose, words, shape, capability, expected):
    words = [*words, "train.precision=bf16"] if "train.precision=fp32" not in words else words
    way, reason = attention.best(compose(*words), shape, capability)
    assert way is expected
    assert reason


@pytest.mark.parametrize("installed", [True, False])
def test_softcap_takes_flex_where_triton_is(compose, installed, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: installed)
    way, reason = attention.best(compose(), AutoConfig.for_model("gemma2"), (9, 0))
    assert (way, "softcap" in reason) == (Attention.flex if installed else Attention.eager, True)


@pytest.mark.parametrize("way", ["sdpa", "eager", "varlen", "auto"])
def test_a_config_builds_its_way_and_the_log_says_it_once(compose, way, capsys):
    attention._say.cache_clear()
    config = compose(f"model.attention={way}")
    names = [build.build(config).config._attn_implementation for _ in range(2)]
    assert names == [{"varlen": "muster_varlen", "auto": "sdpa"}.get(way, way)] * 2
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "attention" in line)
    assert line.startswith(f"attention {'sdpa' if way == 'auto' else way}: ")


@pytest.mark.parametrize("way", ["cudnn", "flex", "flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_what_needs_a_gpu_is_refused_without_one(compose, way):
    with pytest.raises(ConfigError, match=f"model.attention={way}: trains on GPUs only; model.attention=auto"):
        build.build(compose(f"model.attention={way}"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model.attention=cudnn", "train.precision=fp32"], "bf16"),
        (["model.attention=cudnn", "data.packing=true"], "samples of packed rows"),
        (["model.attention=flash_attention_2"], "package flash_attn,"),
        (["model.attention=flash_attention_3"], "package flash_attn_interface,"),
        (["model.attention=flash_attention_4"], "package flash_attn,"),
        (["model.attention=flex"], "triton"),
        (["model.attention=sdpa"], ""),
        (["model.attention=varlen"], ""),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(compose, words, reason, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    config = compose("train.precision=bf16", *words)
    found = attention._lacking(config, config.model.attention, "", on_gpu=True)
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_no_way_leaves_out_part_of_a_models_attention(compose, kind):
    with pytest.raises(ConfigError, match="does not compute the model's attention, which has"):
        attention.chosen(compose("model.attention=varlen"), AutoConfig.for_model(kind))


def test_a_merge_on_a_node_without_gpus_asks_for_none(compose):
    config = compose("cluster=slurm", "model.attention=flash_attention_3")
    assert attention.chosen(config, AutoConfig.for_model("llama", **SMALL)) == "eager"


@pytest.mark.slow
def test_attention_is_compiled_as_one_piece():
    torch._dynamo.reset()
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8)
    whole_graph = torch.compile(lambda *given: attention_kernels.attend(None, *given, None)[0], fullgraph=True)
    expected = attention_kernels.attend(None, query, key, key, None)[0]
    assert torch.allclose(whole_graph(query, key, key), expected, atol=1e-6)
