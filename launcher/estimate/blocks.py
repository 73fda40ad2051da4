"""Describes the decoder blocks of a model family from its shape: linear layers, experts and all other weights; pure.

Names and order are those of transformers' modules. tests/launcher/estimate/test_families.py builds every family and compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from conf.schema_model import Architecture
from launcher.estimate import layer_kinds
from launcher.estimate.config_json import KEPT
from launcher.estimate.family_defaults import ALIASES, DEFAULTS


class Linear(NamedTuple):
    """One linear layer."""

    outputs: int
    inputs: int
    bias: bool
    reads: str
    """Name of the tensor that it reads. Layers that read the same tensor share its memory. `attention`: the output of the
    attention kernel."""


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    linears: Mapping[str, Linear]
    """By path inside the block, in the order in which they run. Experts are not among them: transformers fuses them."""
    norms: int
    """Weights of norms, of attention sinks and of other small tensors."""
    query: int
    """Width of all queries; likewise for the next two. Those of linear attention are about as wide."""
    key: int
    value: int
    experts: int = 0
    expert_inner: int = 0
    """Width inside one expert."""
    chosen: int = 0
    """Experts that a token goes through."""
    router_is_linear: bool = True
    """Whether PEFT gives the router an adapter under `all-linear`."""
    adapted_experts: bool = False
    """Whether PEFT (0.21) gives the experts of this family an adapter under `all-linear`. It then leaves out all layers named
    gate_proj, up_proj or down_proj."""
    fused: tuple[int, ...] = ()
    """Sizes of the fused tensors of experts."""
    router: int = 0
    """Weights of the router."""
    dense_inner: int = 0
    """Width inside the dense MLP, or inside the experts that every token goes through."""
    gated: bool = True
    """The dense MLP has a gate (SwiGLU)."""
    extra_tensors: tuple[int, ...] = field(default=())
    """Sizes of other large tensors, for example of convolutions."""

    @property
    def total(self) -> int:
        linear = sum(rows * columns + rows * bias for rows, columns, bias, _ in self.linears.values())
        return linear + self.norms + self.router + sum(self.fused) + sum(self.extra_tensors)

    @property
    def largest(self) -> int:
        matrices = (rows * columns for rows, columns, _, _ in self.linears.values())
        return max(*matrices, *self.fused, *self.extra_tensors, 0)


def values_of(shape: Architecture) -> dict[str, Any]:
    """Every field of config.json that counting needs: of the shape, else the default of transformers, else None."""
    given = {name: value for name, value in vars(shape).items() if name not in ("extra", "model_type", "tower_gib")}
    extra = {ALIASES.get(name, name): value for name, value in shape.extra.items()}
    return dict.fromkeys(KEPT) | DEFAULTS.get(shape.model_type, {}) | given | extra


def head_dim(shape: Architecture) -> int:
    values = values_of(shape)
    return int(values.get("head_dim") or shape.hidden_size // shape.num_attention_heads)


def kinds(shape: Architecture) -> list[tuple[Block, int]]:
    """The different blocks of a model, and how many there are of each. Empty for a family that cannot be counted."""
    return [(block, len(layers)) for block, layers in layers_of_kinds(shape)]


def layers_of_kinds(shape: Architecture) -> list[tuple[Block, list[int]]]:
    """The different blocks of a model, and the numbers of the layers of each. Empty for a family that cannot be counted."""
    values = values_of(shape)
    if layer_kinds.why_not_counted(shape.model_type, values):
        return []
    found: dict[tuple[bool, bool], list[int]] = {}
    for layer in range(shape.num_hidden_layers):
        kind = (
            layer_kinds.has_experts(shape.model_type, values, layer),
            layer_kinds.is_recurrent(shape.model_type, values, layer),
        )
        found.setdefault(kind, []).append(layer)
    return [(_block(shape, values, sparse, recurrent), layers) for (sparse, recurrent), layers in found.items()]


def largest(shape: Architecture) -> Block:
    """The block with the most weights. Only for a family that can be counted."""
    return max((block for block, _ in kinds(shape)), key=lambda block: block.total)


def _block(shape: Architecture, values: dict[str, Any], sparse: bool, recurrent: bool) -> Block:
    if shape.model_type == "gpt2":
        return _gpt2(shape, values)
    mixer = _linear_attention(shape, values) if recurrent else _attention(shape, values)
    mlp = _experts(shape, values) if sparse else _dense(shape, values)
    return Block(
        linears=mixer.pop("linears") | mlp.pop("linears"),
        norms=mixer.pop("norms") + mlp.pop("norms") + _norms(shape, values),
        adapted_experts=shape.model_type in layer_kinds.ADAPTED_EXPERTS,
        **mixer,
        **mlp,
    )


def _norms(shape: Architecture, values: dict[str, Any]) -> int:
    """Weights of the norms of a block, apart from those of queries and keys."""
    family, hidden = shape.model_type, shape.hidden_size
    number = {"olmo": 0, "phi": 1, "cohere": 1, "cohere2": 1}.get(family, 2)
    if family in ("gemma2", "gemma3_text", "glm4"):
        number = 4
    if family == "stablelm" and values["use_parallel_residual"]:
        number = 1
    if family == "falcon":
        two = values["num_ln_in_parallel_attn"] in (None, 2) if values["new_decoder_architecture"] else False
        number = 2 if two or not values["parallel_attn"] else 1
    has_bias = family in ("phi", "starcoder2", "stablelm", "nemotron", "phimoe", "gpt_neox", "opt", "falcon")
    return number * hidden * (1 + has_bias)


def _attention(shape: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    """Attention with separate or fused projections of queries, keys and values."""
    family, hidden, size = shape.model_type, shape.hidden_size, head_dim(shape)
    if family in ("deepseek_v2", "deepseek_v3"):
        return _latent_attention(shape, values)
    heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads
    query, key = heads * size, key_heads * size
    inner, outer = layer_kinds.attention_biases(family, values)
    norms = 0
    if layer_kinds.norms_heads(family, values):
        norms = query + key if family in layer_kinds.WIDE_HEAD_NORMS else 2 * size
    if family == "gpt_oss":
        norms += heads  # attention sinks
    gate = 2 if family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text") else 1  # queries come with a gate
    prefix, output = "self_attn", "o_proj"
    if family in ("phi3", "gpt_neox", "falcon"):
        names = {"phi3": ("self_attn.qkv_proj", "self_attn.o_proj")}
        names |= {"gpt_neox": ("attention.query_key_value", "attention.dense")}
        names |= {"falcon": ("self_attention.query_key_value", "self_attention.dense")}
        if family == "falcon":
            key = size * layer_kinds.falcon_key_heads(values)
        first, last = names[family]
        linears = {
            first: Linear(query + 2 * key, hidden, inner, "attention input"),
            last: Linear(hidden, query, outer, "attention"),
        }
        return {"linears": linears, "norms": norms, "query": query, "key": key, "value": key}
    output = {"phi": "dense", "opt": "out_proj"}.get(family, output)
    linears = {
        f"{prefix}.q_proj": Linear(gate * query, hidden, inner, "attention input"),
        f"{prefix}.k_proj": Linear(key, hidden, inner, "attention input"),
        f"{prefix}.v_proj": Linear(key, hidden, inner, "attention input"),
        f"{prefix}.{output}": Linear(hidden, query, outer, "attention"),
    }
    return {"linears": linears, "norms": norms, "query": query, "key": key, "value": key}


def _latent_attention(shape: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek's attention, which projects through low ranks."""
    hidden, heads, bias = shape.hidden_size, shape.num_attention_heads, bool(values["attention_bias"])
    nope, rope, value = values["qk_nope_head_dim"], values["qk_rope_head_dim"], values["v_head_dim"]
    rank, query_rank = values["kv_lora_rank"], values["q_lora_rank"]
    query = heads * (nope + rope)
    linears = {"self_attn.q_proj": Linear(query, hidden, False, "attention input")}
    if query_rank:
        linears = {
            "self_attn.q_a_proj": Linear(query_rank, hidden, bias, "attention input"),
            "self_attn.q_b_proj": Linear(query, query_rank, False, "low-rank queries"),
        }
    linears |= {
        "self_attn.kv_a_proj_with_mqa": Linear(rank + rope, hidden, bias, "attention input"),
        "self_attn.kv_b_proj": Linear(heads * (nope + value), rank, False, "low-rank keys"),
        "self_attn.o_proj": Linear(hidden, heads * value, bias, "attention"),
    }
    norms = rank + (query_rank or 0)
    return {"linears": linears, "norms": norms, "query": query, "key": query, "value": heads * value}


def _linear_attention(shape: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    """The gated delta rule of qwen3_next and qwen3_5."""
    hidden, heads = shape.hidden_size, values["linear_num_value_heads"]
    key = values["linear_num_key_heads"] * values["linear_key_head_dim"]
    value = heads * values["linear_value_head_dim"]
    sizes = {"in_proj_qkvz": 2 * key + 2 * value, "in_proj_ba": 2 * heads}
    if shape.model_type != "qwen3_next":
        sizes = {"in_proj_qkv": 2 * key + value, "in_proj_z": value, "in_proj_b": heads, "in_proj_a": heads}
    linears = {f"linear_attn.{name}": Linear(size, hidden, False, "attention input") for name, size in sizes.items()}
    linears["linear_attn.out_proj"] = Linear(hidden, value, False, "attention")
    convolution = (2 * key + value) * values["linear_conv_kernel_dim"]
    norms = 2 * heads + values["linear_value_head_dim"]
    return {
        "linears": linears,
        "norms": norms,
        "query": value,
        "key": key,
        "value": value,
        "extra_tensors": (convolution,),
    }


def _dense(shape: Architecture, values: dict[str, Any], inner: int = 0, prefix: str = "mlp") -> dict[str, Any]:
    """An MLP that every token goes through, `inner` wide."""
    family, hidden = shape.model_type, shape.hidden_size
    inner = inner or layer_kinds.dense_inner(family, values)
    bias = layer_kinds.mlp_bias(family, values)
    names = {
        "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    }
    names |= {"phi": ("mlp.fc1", "mlp.fc2"), "opt": ("fc1", "fc2"), "starcoder2": ("mlp.c_fc", "mlp.c_proj")}
    names |= {family: ("mlp.up_proj", "mlp.down_proj") for family in ("nemotron", "apertus", "arcee")}
    gated, fused = family not in names, family in ("phi3", "glm", "glm4")
    if family == "llama4_text":
        prefix = prefix.replace("mlp", "feed_forward")
    up, down = names.get(family, (f"{prefix}.up_proj", f"{prefix}.down_proj"))
    linears = {up: Linear(inner, hidden, bias, "MLP input")}
    if fused:
        linears = {f"{prefix}.gate_up_proj": Linear(2 * inner, hidden, bias, "MLP input")}
    elif gated:
        linears = {f"{prefix}.gate_proj": Linear(inner, hidden, bias, "MLP input"), **linears}
    linears[down] = Linear(hidden, inner, bias, "MLP product")
    norms = 2 if family == "apertus" and values["hidden_act"] == "xielu" else 0  # two numbers of its activation
    return {"linears": linears, "norms": norms, "dense_inner": inner, "gated": gated}


def _experts(shape: Architecture, values: dict[str, Any]) -> dict[str, Any]:
    """Routed experts, with those that every token goes through."""
    family, hidden = shape.model_type, shape.hidden_size
    number, inner, shared = layer_kinds.expert_sizes(family, values)
    mlp: dict[str, Any] = {"linears": {}, "norms": 0}
    if shared:
        folder = "shared_expert" if family.startswith(("qwen", "llama4")) else "shared_experts"
        mlp = _dense(shape, values, shared, f"mlp.{folder}")
    if family.startswith("qwen") and shared:
        mlp["linears"]["mlp.shared_expert_gate"] = Linear(1, hidden, False, "MLP input")
    fused: tuple[int, ...] = (number * 2 * inner * hidden, number * inner * hidden)
    router = number * hidden
    if family == "gpt_oss":
        fused, router = (*fused, number * 2 * inner, number * hidden), router + number
    if family == "ernie4_5_moe":
        router += number  # a correction that is stored as a parameter
    return mlp | {
        "experts": number,
        "expert_inner": inner,
        "chosen": int(values["num_experts_per_tok"] or 1),
        "fused": fused,
        "router": router,
        "router_is_linear": family in layer_kinds.ADAPTED_EXPERTS or family in ("phimoe", "llama4_text"),
    }


def _gpt2(shape: Architecture, values: dict[str, Any]) -> Block:
    """GPT-2, whose layers store the transposed matrix and always have a bias."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    linears = {
        "attn.c_attn": Linear(3 * hidden, hidden, True, "attention input"),
        "attn.c_proj": Linear(hidden, hidden, True, "attention"),
        "mlp.c_fc": Linear(inner, hidden, True, "MLP input"),
        "mlp.c_proj": Linear(hidden, inner, True, "MLP product"),
    }
    return Block(linears, 4 * hidden, hidden, hidden, hidden, dense_inner=inner, gated=False)
