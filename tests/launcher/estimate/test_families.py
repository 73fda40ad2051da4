"""launcher/estimate/blocks.py: parameters of many families, counted as transformers and PEFT build them."""

import json
from typing import Any

import pytest

from conf.choices import AdapterKind
from conf.schema_training import Adapter
from launcher.estimate.config_json import architecture
from launcher.estimate.family_defaults import DEFAULTS
from launcher.estimate.parameters import count
from tests.conftest import ROOT

SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LOW_RANK = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}  # fmt: skip
LINEAR = {
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
}  # fmt: skip
FORMS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 32}],
    "mistral": [{"head_dim": 32}],
    "ministral": [{"head_dim": 32}],
    "ministral3": [{"head_dim": 32, "tie_word_embeddings": True}],
    "mixtral": [{"num_local_experts": 4}],
    "qwen2": [{"tie_word_embeddings": True}],
    "qwen3": [{"head_dim": 32}],
    "qwen2_moe": [EXPERTS | {"shared_expert_intermediate_size": 48},
                  EXPERTS | {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 2, "mlp_only_layers": [3]}],
    "qwen3_moe": [EXPERTS | {"head_dim": 32}, EXPERTS | {"head_dim": 32, "mlp_only_layers": [0], "attention_bias": True}],
    "qwen3_next": [EXPERTS | LINEAR | {"shared_expert_intermediate_size": 40},
                   EXPERTS | LINEAR | {"shared_expert_intermediate_size": 40, "full_attention_interval": 2}],
    "qwen3_5_text": [LINEAR, LINEAR | {"layer_types": ["linear_attention", "full_attention"] * 2}],
    "qwen3_5_moe_text": [EXPERTS | LINEAR | {"shared_expert_intermediate_size": 40}],
    "gemma": [{"head_dim": 32}],
    "gemma2": [{"head_dim": 32}],
    "gemma3_text": [{"head_dim": 32}],
    "phi": [{}],
    "phi3": [{}],
    "phimoe": [{"num_local_experts": 4}, {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}],
    "olmo": [{}],
    "olmo2": [{}],
    "olmo3": [{}],
    "olmoe": [{"num_experts": 4}],
    "granite": [{"mlp_bias": True}],
    "granitemoe": [{"num_local_experts": 4}],
    "deepseek_v2": [ROUTED | LOW_RANK, ROUTED | LOW_RANK | {"q_lora_rank": None}],
    "deepseek_v3": [ROUTED | LOW_RANK, ROUTED | LOW_RANK | {"attention_bias": True, "n_shared_experts": 1}],
    "glm": [{"head_dim": 32}],
    "glm4": [{"head_dim": 32}],
    "glm4_moe": [ROUTED | {"head_dim": 32}, ROUTED | {"head_dim": 32, "use_qk_norm": True, "attention_bias": True}],
    "gpt_oss": [{"head_dim": 32, "num_local_experts": 4}],
    "smollm3": [{}],
    "cohere": [{}, {"use_qk_norm": True}],
    "cohere2": [{}],
    "starcoder2": [{}, {"use_bias": False}],
    "stablelm": [{"use_qkv_bias": True}, {"use_parallel_residual": True}],
    "nemotron": [{"attention_bias": True, "mlp_bias": True}],
    "exaone4": [{"sliding_window": 16, "sliding_window_pattern": 4}],
    "ernie4_5": [{"head_dim": 32, "use_bias": True}],
    "ernie4_5_moe": [{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 2,
                      "moe_layer_start_index": 1, "moe_layer_end_index": 2}],
    "llama4_text": [{"head_dim": 32, "num_local_experts": 4, "intermediate_size_mlp": 160, "interleave_moe_layer_step": 2},
                    {"head_dim": 32, "num_local_experts": 4, "intermediate_size_mlp": 160, "moe_layers": [0, 3]}],
    "gpt_neox": [{"num_key_value_heads": None}, {"num_key_value_heads": None, "attention_bias": False}],
    "gpt2": [{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": None}, {"n_inner": 100}],
    "opt": [{"ffn_dim": 96, "word_embed_proj_dim": 64}, {"ffn_dim": 96, "word_embed_proj_dim": 64, "enable_bias": False}],
    "falcon": [{"num_kv_heads": 2, "new_decoder_architecture": True}, {"multi_query": True}, {"multi_query": False, "bias": True},
               {"multi_query": True, "parallel_attn": False}, {"ffn_hidden_size": 100}],
    "seed_oss": [{"head_dim": 32, "attention_out_bias": True, "mlp_bias": True}],
    "hunyuan_v1_dense": [{"head_dim": 32, "attention_bias": True}],
    "apertus": [{}, {"hidden_act": "silu"}],
    "arcee": [{"mlp_bias": True}],
    "helium": [{"head_dim": 16, "attention_bias": True}],
    "dots1": [ROUTED | {"head_dim": 32}],
    "minimax_m2": [{"head_dim": 32, "num_local_experts": 4}],
}  # fmt: skip
CASES = [(family, number) for family, forms in FORMS.items() for number in range(len(forms))]


def config_of(family: str, number: int) -> Any:
    """A small model of a family, as transformers reads it from config.json."""
    from transformers import AutoConfig

    form = FORMS[family][number]
    common = {} if family == "gpt2" else {key: value for key, value in SMALL.items() if key not in form}
    return AutoConfig.for_model(family, **(common | form))


def on_meta(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def sizes(model: Any, trained: bool = False) -> list[int]:
    return [item.numel() for item in model.parameters() if item.requires_grad or not trained]


def test_every_family_has_a_case() -> None:
    assert set(FORMS) == set(DEFAULTS)


@pytest.mark.parametrize(("family", "number"), CASES)
def test_a_small_model_has_the_parameters_that_transformers_builds(family: str, number: int) -> None:
    pytest.importorskip("transformers")
    config = config_of(family, number)
    shape = architecture(config.to_diff_dict())
    assert shape
    counts, model = count(shape, Adapter()), on_meta(config)
    assert counts
    assert (counts.total, counts.largest) == (sum(sizes(model)), max(sizes(model)))


MULTIMODAL = {
    name: (kind, values)
    for name, (kind, values) in json.loads((ROOT / "tests/jobs/families.json").read_text()).items()
    if "text_config" in values and kind not in ("gemma4", "glm4v", "lfm2_vl")  # these are not counted
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_of_a_multimodal_model_has_the_parameters_that_transformers_builds(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    kind, values = MULTIMODAL[name]
    config = transformers.AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    text = ("model.language_model.", "language_model.", "lm_head.")
    expected = sum(item.numel() for name, item in model.named_parameters() if name.startswith(text))
    shape = architecture(
        config.to_diff_dict() | {"model_type": kind, "tie_word_embeddings": config.tie_word_embeddings}
    )
    assert shape
    counts = count(shape, Adapter())
    assert counts and counts.total == expected


@pytest.mark.parametrize("family", DEFAULTS)
def test_a_model_of_real_size_has_the_parameters_that_transformers_builds(family: str) -> None:
    """Of the size that the config class has where config.json says nothing: about that of a published model."""
    from transformers import AutoConfig

    more = {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6} if family == "dots1" else {}
    more |= {"head_dim": 128} if family in ("ministral", "hunyuan_v1_dense") else {}  # without it transformers fails
    more |= {"num_key_value_heads": 8} if family == "nemotron" else {}
    config = AutoConfig.for_model(family, **more)
    shape = architecture({"model_type": family, **more})
    assert shape
    counts, model = count(shape, Adapter()), on_meta(config)
    assert counts
    assert (counts.total, counts.largest) == (sum(sizes(model)), max(sizes(model)))


@pytest.mark.filterwarnings(
    "ignore:The following .*_pattern keys:RuntimeWarning:peft", "ignore:fan_in_fan_out:UserWarning"
)
@pytest.mark.parametrize(("family", "number"), CASES)
def test_adapters_have_the_parameters_that_peft_builds(family: str, number: int) -> None:
    peft = pytest.importorskip("peft")
    config = config_of(family, number)
    plan = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(on_meta(config), plan, autocast_adapter_dtype=False)
    shape = architecture(config.to_diff_dict())
    assert shape
    counts = count(shape, Adapter(kind=AdapterKind.lora, r=8))
    assert counts
    assert counts.trained == sum(sizes(model, trained=True))
