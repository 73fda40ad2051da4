"""Attention gives a sample in a packed row the same result as in a row of its own; and which implementation is selected."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.models.falcon import modeling_falcon

from conf.choices import Attention
from conf.errors import ConfigError
from jobs.data import batches as data
from jobs.distributed.log_once import log_once
from jobs.model import attention, attention_kernels, build, fused_cross_entropy
from jobs.training import loss
from tests.conftest import Compose
from tests.jobs.networks import SMALL, check_equal, gradients, network, rows, whole

LENGTHS = [19, 30, 7, 1, 12, 25, 3]
IMPLEMENTATIONS = ["muster_varlen", "sdpa", "eager"]
LLAMA8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


def loss_and_gradients(model, *batches):
    """Loss and gradients of all batches."""
    values = [loss.summed_cross_entropy(model, batch) for batch in batches]
    torch.stack(values).sum().backward()
    return sum(value.item() for value in values), gradients(model)


def one_row_batches(all_rows):
    return [data.collate(all_rows, np.array([row]), pad=0) for row in range(len(all_rows))]


@pytest.fixture
def no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if transformers builds a mask, or searches for packed rows, which synchronizes with the GPU."""

    def refused(*_, **__) -> None:
        raise AssertionError("a mask was built")

    for name in ("sdpa_mask", "eager_mask", "find_packed_sequence_indices"):
        monkeypatch.setattr(masking_utils, name, refused)
    monkeypatch.setattr(
        masking_utils.AttentionMaskInterface, "_global_mapping", dict.fromkeys(["sdpa", "eager"], refused)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_packed_rows_equal_rows_of_one_sample(implementation, kind) -> None:
    extra = {"llama": {}, "qwen3": {"head_dim": 24}, "mistral": {"sliding_window": 9}}[kind]
    expected, expected_gradients = loss_and_gradients(network(kind, "eager", **extra), *one_row_batches(rows(LENGTHS)))
    packed = rows(LENGTHS, pack_into=40)
    assert len(packed) < len(LENGTHS) / 2
    value, actual = loss_and_gradients(network(kind, implementation, **extra), whole(packed))
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(actual, expected_gradients, 1e-5)


@pytest.mark.parametrize("implementation", ["muster_cudnn", "muster_varlen"])
@pytest.mark.parametrize("window", [None, 9])
def test_padded_rows_equal_eager_attention(implementation, window) -> None:
    batch = whole(rows(LENGTHS))
    expected, expected_gradients = loss_and_gradients(network("mistral", "eager", sliding_window=window), batch)
    value, actual = loss_and_gradients(network("mistral", implementation, sliding_window=window), batch)
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(actual, expected_gradients, 1e-5)


@pytest.mark.parametrize("packed", [None, 40])
def test_no_mask_is_built(packed, no_masks) -> None:
    all_rows = rows(LENGTHS, packed)
    model = network(attention="muster_varlen" if packed else "muster_cudnn")
    assert fused_cross_entropy.fuse(model)
    loss_and_gradients(model, whole(all_rows))
    with pytest.raises(AssertionError, match="a mask was built"):
        loss_and_gradients(network(attention="sdpa"), whole(all_rows))


def test_dropout_of_attention_is_kept() -> None:
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
        ([], AutoConfig.for_model("gemma2"), (9, 0), Attention.eager),
        ([], AutoConfig.for_model("gpt_oss"), None, Attention.eager),
        ([], AutoConfig.for_model("gpt_oss"), (9, 0), Attention.varlen),
        (["data.packing=true"], AutoConfig.for_model("granite_swa"), (9, 0), Attention.varlen),
        (["train.precision=fp32"], AutoConfig.for_model("gpt_oss"), (9, 0), Attention.eager),
        ([], AutoConfig.for_model("gpt_oss", head_dim=100), (9, 0), Attention.eager),
        ([], AutoConfig.for_model("mimo_v2_flash"), (9, 0), Attention.eager),
        ([], AutoConfig.for_model("bloom"), (9, 0), Attention.eager),
        ([], AutoConfig.for_model("gptj"), (9, 0), Attention.eager),
    ],
)
def test_auto_selects_the_best_implementation_and_gives_a_reason(
    compose: Compose, words, shape, capability, expected
) -> None:
    words = [*words, "train.precision=bf16"] if "train.precision=fp32" not in words else words
    implementation, reason = attention.best_implementation(compose(*words), shape, capability)
    assert implementation is expected
    assert reason


@pytest.mark.parametrize("kind", ["gpt_oss", "granite_swa"])
@pytest.mark.parametrize("packed", [None, 40])
def test_sinks_equal_eager_attention(kind, packed) -> None:
    extra = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    if kind == "gpt_oss":
        extra |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    expected, expected_gradients = loss_and_gradients(network(kind, "eager", **extra), *one_row_batches(rows(LENGTHS)))
    model = network(kind, "muster_varlen", **extra)
    value, actual = loss_and_gradients(model, whole(rows(LENGTHS, packed)))
    assert any("sinks" in name for name in actual)
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(actual, expected_gradients, 1e-5)


def test_sinks_of_other_heads_are_an_error() -> None:
    query = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="2 attention sinks for 4 heads"):
        attention_kernels.attend(None, query, query, query, None, s_aux=torch.zeros(2))


def test_an_argument_that_the_kernels_ignore_prevents_them(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    names = attention._arguments(AutoModelForCausalLM._model_mapping[type(llama())])
    assert {"dropout", "scaling"} <= names <= attention.KNOWN_ARGUMENTS
    monkeypatch.setattr(attention, "_arguments", lambda _: names | {"position_bias"})
    implementation, reason = attention.best_implementation(compose("train.precision=bf16"), llama(), (9, 0))
    assert (implementation, reason) == (Attention.sdpa, "the model's attention has an argument position_bias")


def test_eager_attention_adds_the_alibi_of_falcon_twice(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, extra = "falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}
    tokens = torch.arange(3, 30)[None]
    expected = network(kind, "sdpa", **extra)(tokens).logits
    assert not torch.allclose(network(kind, "eager", **extra)(tokens).logits, expected, atol=1e-3)
    build_alibi = modeling_falcon.build_alibi_tensor
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", lambda *a, **k: build_alibi(*a, **k) / 2)
    torch.testing.assert_close(network(kind, "eager", **extra)(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    config, shape = compose("model.attention=eager"), AutoConfig.for_model(kind, **extra)
    with pytest.raises(
        ConfigError, match=r"model\.attention=eager: adds the ALiBi .* twice, .*; set model\.attention=auto"
    ):
        attention.select(config, shape)
    assert attention.select(compose("model.attention=auto"), shape) == "sdpa"
    attention.select(config, AutoConfig.for_model(kind))  # without ALiBi


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "varlen", "auto"])
def test_the_config_selects_attention_and_the_log_names_it_once(
    compose: Compose, implementation, capsys: pytest.CaptureFixture[str]
) -> None:
    log_once.cache_clear()
    config = compose(f"model.attention={implementation}")
    names = [build.build(config).config._attn_implementation for _ in range(2)]
    assert names == [{"varlen": "muster_varlen", "auto": "sdpa"}.get(implementation, implementation)] * 2
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "attention" in line)
    assert line.startswith(f"attention {'sdpa' if implementation == 'auto' else implementation}: ")


@pytest.mark.parametrize(
    "implementation", ["cudnn", "flex", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
)
def test_implementations_for_gpus_are_refused_on_cpus(compose: Compose, implementation) -> None:
    with pytest.raises(
        ConfigError, match=f"model.attention={implementation}: runs on GPUs only; set model.attention=auto"
    ):
        build.build(compose(f"model.attention={implementation}"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model.attention=cudnn", "train.precision=fp32"], "bf16"),
        (["model.attention=cudnn", "data.packing=true"], "the samples of packed rows"),
        (["model.attention=flash_attention_2"], "package flash_attn,"),
        (["model.attention=flash_attention_3"], "package flash_attn_interface,"),
        (["model.attention=flash_attention_4"], "package flash_attn,"),
        (["model.attention=flex"], "triton"),
        (["model.attention=sdpa"], ""),
        (["model.attention=varlen"], ""),
    ],
)
def test_unavailable_implementations_are_refused_with_the_reason(
    compose: Compose, words, reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    config = compose("train.precision=bf16", *words)
    reason_found = attention._why_unavailable(config, config.model.attention, "", on_gpu=True)
    assert reason in reason_found
    assert bool(reason) == bool(reason_found)


@pytest.mark.parametrize("kind", ["gemma2", "mimo_v2_flash", "deepseek_v3"])
def test_features_of_a_model_are_never_left_out(compose: Compose, kind) -> None:
    with pytest.raises(ConfigError, match="does not support this model: its attention has"):
        attention.select(compose("model.attention=varlen"), AutoConfig.for_model(kind))


def test_consolidation_on_a_node_without_gpus_needs_none(compose: Compose) -> None:
    config = compose("cluster=slurm", "model.attention=flash_attention_3")
    assert attention.select(config, AutoConfig.for_model("llama", **SMALL)) == "eager"


@pytest.mark.proof
def test_attention_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8)
    whole_graph = torch.compile(lambda *given: attention_kernels.attend(None, *given, None)[0], fullgraph=True)
    expected = attention_kernels.attend(None, query, key, key, None)[0]
    assert torch.allclose(whole_graph(query, key, key), expected, atol=1e-6)
