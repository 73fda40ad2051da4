"""Says how the layers of each model family differ: which have experts, which have biases, how wide they are; pure.

`values` are fields of config.json under the names of `family_defaults`; a field that is not known is None.
"""

from typing import Any

from launcher.estimate.family_defaults import DEFAULTS

ADAPTED_EXPERTS = frozenset({
    *("mixtral", "qwen3_moe", "qwen3_next", "olmoe", "minimax_m2"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe"),
})  # fmt: skip
"""Families whose experts PEFT (0.21) adapts under `all-linear`."""
ALWAYS_EXPERTS = frozenset({
    *("mixtral", "olmoe", "granitemoe", "gpt_oss", "phimoe", "minimax_m2", "qwen3_5_moe_text"),
})  # fmt: skip
"""Families with experts in every layer."""
WIDE_EXPERTS = frozenset({"mixtral", "olmoe", "granitemoe", "gpt_oss", "phimoe", "minimax_m2", "llama4_text"})
"""Families whose experts are `intermediate_size` wide. Those of others are `moe_intermediate_size` wide."""
RECURRENT = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""Families with linear attention in most layers."""
HEAD_NORMS = frozenset({
    *("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma3_text", "exaone4"),
    *("hunyuan_v1_dense", "apertus", "dots1", "olmo2", "olmo3", "olmoe", "minimax_m2"),
})  # fmt: skip
"""Families that always normalize queries and keys with trained weights."""
WIDE_HEAD_NORMS = frozenset({"olmo2", "olmo3", "olmoe", "minimax_m2", "cohere"})
"""Families whose norms of queries and keys have a weight for every head."""
EVERY_BIAS = frozenset({"phi", "gpt_oss"})
"""Families whose projections of attention always have biases."""
NO_OUTPUT_BIAS = frozenset({"qwen2", "qwen2_moe", "glm", "glm4", "glm4_moe", "helium", "stablelm"})
"""Families whose output projection of attention has no bias, where queries, keys and values may have one."""
NO_BIAS = frozenset({
    *("mistral", "mixtral", "ministral", "ministral3", "phi3", "exaone4", "minimax_m2"),
})  # fmt: skip
"""Families whose projections of attention never have biases."""
MLP_BIASES = frozenset({"llama", "granite", "smollm3", "nemotron", "seed_oss", "arcee", "helium"})
"""Families with the field `mlp_bias`."""


def why_not_counted(family: str, values: dict[str, Any]) -> str | None:
    """Why the parameters of a model cannot be counted from its config.json; None if they can."""
    if family not in DEFAULTS:
        return f"model_type={family} is a family that Muster cannot count"
    if values.get("qk_layernorm"):
        return f"qk_layernorm=true of model_type={family} is not counted"
    if family == "opt" and (
        values.get("word_embed_proj_dim") not in (None, values["hidden_size"])
        or values.get("do_layer_norm_before") is False
        or values.get("_remove_final_layer_norm")
        or values.get("layer_norm_elementwise_affine") is False
    ):
        return "this form of OPT, with projected embeddings or norms after the layers, is not counted"
    return None


def has_experts(family: str, values: dict[str, Any], layer: int) -> bool:
    """Whether a layer has routed experts."""
    if not values.get("num_experts"):
        return False
    if kinds := values.get("mlp_layer_types"):
        return bool(kinds[layer] == "sparse")
    if family in ALWAYS_EXPERTS:
        return True
    if family in ("qwen2_moe", "qwen3_moe", "qwen3_next"):
        step = values.get("decoder_sparse_step") or 1
        return layer not in (values.get("mlp_only_layers") or []) and (layer + 1) % step == 0
    if family == "ernie4_5_moe":
        end = values.get("moe_layer_end_index")
        end = values["num_hidden_layers"] - 1 if end in (None, -1) else end
        interval = values.get("moe_layer_interval") or 1
        return bool((layer + 1) % interval == 0 and (values.get("moe_layer_start_index") or 0) <= layer <= end)
    if family == "llama4_text":
        step = values.get("interleave_moe_layer_step") or 1
        listed = values.get("moe_layers")
        return layer in listed if listed is not None else (layer + 1) % step == 0
    return layer >= (values.get("first_k_dense_replace") or 0)


def is_recurrent(family: str, values: dict[str, Any], layer: int) -> bool:
    """Whether a layer has linear attention instead of attention."""
    if family not in RECURRENT:
        return False
    if kinds := values.get("layer_types"):
        return bool(kinds[layer] == "linear_attention")
    return (layer + 1) % (values.get("full_attention_interval") or 4) != 0


def norms_heads(family: str, values: dict[str, Any]) -> bool:
    """Whether queries and keys are normalized with trained weights."""
    if family == "minimax_m2":
        return values.get("use_qk_norm") is not False
    return family in HEAD_NORMS or (family in ("glm4_moe", "cohere") and bool(values.get("use_qk_norm")))


def attention_biases(family: str, values: dict[str, Any]) -> tuple[bool, bool]:
    """Whether (queries, keys and values; the output projection) have biases."""
    if family in EVERY_BIAS:
        return True, True
    if family in NO_BIAS:
        return False, False
    if family == "qwen2":
        return True, False
    if family in ("starcoder2", "ernie4_5", "ernie4_5_moe", "opt", "falcon"):
        return bool(values.get("use_bias")), bool(values.get("use_bias"))
    bias = bool(values.get("attention_bias"))
    if family == "seed_oss":
        return bias, bool(values.get("attention_out_bias"))
    return bias, bias and family not in NO_OUTPUT_BIAS


def mlp_bias(family: str, values: dict[str, Any]) -> bool:
    """Whether the layers of a dense MLP have biases."""
    if family in ("phi", "gpt_neox"):
        return True
    if family in ("starcoder2", "ernie4_5", "ernie4_5_moe", "opt", "falcon"):
        return bool(values.get("use_bias"))
    return family in MLP_BIASES and bool(values.get("mlp_bias"))


def dense_inner(family: str, values: dict[str, Any]) -> int:
    """Width inside a dense MLP."""
    return int(values["intermediate_size_mlp"] if family == "llama4_text" else values["intermediate_size"])


def expert_sizes(family: str, values: dict[str, Any]) -> tuple[int, int, int]:
    """(number of routed experts, width of one, width of the experts that every token goes through)."""
    inner = int(values["intermediate_size"] if family in WIDE_EXPERTS else values["moe_intermediate_size"])
    if family == "llama4_text":
        shared = inner
    elif family.startswith("qwen"):
        shared = int(values.get("shared_expert_intermediate_size") or 0) if family != "qwen3_moe" else 0
    elif family in ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe"):
        shared = inner * int(values.get("n_shared_experts") or 0)
    else:
        shared = 0
    return int(values["num_experts"]), inner, shared


def falcon_key_heads(values: dict[str, Any]) -> int:
    """Heads of keys and values of Falcon, which has three forms of attention."""
    if values.get("new_decoder_architecture"):
        return int(values.get("num_key_value_heads") or values["num_attention_heads"])
    return 1 if values.get("multi_query") else int(values["num_attention_heads"])
