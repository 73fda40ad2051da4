"""Counts the parameters of a model and of its adapters from the model's shape, without building it; pure."""

from dataclasses import dataclass

from conf.choices import AdapterKind
from conf.schema import Adapter, Architecture

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
"""Values of `model_type` that can be counted. Memory of other families is not estimated."""


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""

    total: int
    block: int
    """In one decoder block."""
    root: int
    """Outside the blocks: embedding, final norm, output head."""
    head: int
    """In the output head, tied or not."""
    largest: int
    """In the largest single tensor."""
    trained: int
    """Trained parameters: all of them, or those of the adapter. Likewise for the next two."""
    trained_block: int
    trained_root: int
    frozen: int
    """In the base under an adapter; 0 in a full fine-tune."""


def count(shape: Architecture, adapter: Adapter) -> Counts | None:
    """Exact numbers of parameters as transformers and PEFT build them. None for a family not in `FAMILIES`."""
    if shape.model_type not in FAMILIES:
        return None
    layers, embedding = shape.num_hidden_layers, shape.vocab_size * shape.hidden_size
    linear = linears(shape)
    block = sum(rows * columns + rows * bias for rows, columns, bias in linear.values()) + 2 * shape.hidden_size
    largest = max(embedding, *(rows * columns for rows, columns, _ in linear.values()))
    if number := experts(shape):
        block += number * (3 * shape.intermediate_size + 1) * shape.hidden_size  # fused expert tensors, and the router
        largest = max(largest, number * 2 * shape.intermediate_size * shape.hidden_size)
    if shape.model_type == "qwen3":
        block += 2 * head_dim(shape)  # norms of queries and keys
    root = embedding * (1 if shape.tie_word_embeddings else 2) + shape.hidden_size
    total = layers * block + root
    trained_block, trained_root, frozen = block, root, 0
    if adapter.kind is not AdapterKind.none:
        trained_block, trained_root, frozen = *_adapter(shape, adapter), total
    trained = layers * trained_block + trained_root
    return Counts(total, block, root, embedding, largest, trained, trained_block, trained_root, frozen)


def _adapter(shape: Architecture, adapter: Adapter) -> tuple[int, int]:
    """Adapter parameters (in one block, on the output head): A and B for each target, with DoRA also one norm per row."""
    linear, on_head = linears(shape), "lm_head" in adapter.targets
    block = sum(adapter.r * (linear[name][0] + linear[name][1]) for name in targets(shape, adapter))
    block += _expert_adapter(shape, adapter.r) if on_experts(adapter) else 0
    root = adapter.r * (shape.hidden_size + shape.vocab_size) * on_head
    if adapter.dora:
        block += sum(linear[name][0] for name in targets(shape, adapter))
        root += shape.vocab_size * on_head
    return block, root


def head_dim(shape: Architecture) -> int:
    default = 128 if shape.model_type == "qwen3" else shape.hidden_size // shape.num_attention_heads
    return int(shape.extra.get("head_dim") or default)


def experts(shape: Architecture) -> int:
    """Experts of each block; 0 for dense models."""
    return int(shape.extra.get("num_local_experts", 8)) if shape.model_type == "mixtral" else 0


def linears(shape: Architecture) -> dict[str, tuple[int, int, bool]]:
    """Linear layers of a block: name -> (outputs, inputs, whether it has a bias).

    Experts are not among them: transformers fuses them into tensors of their own.
    """
    query, key = (heads * head_dim(shape) for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    output_bias = shape.model_type in ("llama", "qwen3") and bool(shape.extra.get("attention_bias", False))
    input_bias = output_bias or shape.model_type == "qwen2"
    layers = {
        "q_proj": (query, shape.hidden_size, input_bias),
        "k_proj": (key, shape.hidden_size, input_bias),
        "v_proj": (key, shape.hidden_size, input_bias),
        "o_proj": (shape.hidden_size, query, output_bias),
    }
    if not experts(shape):
        bias = shape.model_type == "llama" and bool(shape.extra.get("mlp_bias", False))
        for name in ("gate_proj", "up_proj"):
            layers[name] = (shape.intermediate_size, shape.hidden_size, bias)
        layers["down_proj"] = (shape.hidden_size, shape.intermediate_size, bias)
    return layers


def targets(shape: Architecture, adapter: Adapter) -> list[str]:
    """Linear layers of a block that get an adapter, matched as PEFT does: by name, or by the end of a dotted name."""
    if adapter.targets == ["all-linear"]:
        return list(linears(shape))
    names = {target.rpartition(".")[2] for target in adapter.targets}
    return [name for name in linears(shape) if name in names]


def on_experts(adapter: Adapter) -> bool:
    """Whether experts get adapters too, if the model has any."""
    return adapter.kind is not AdapterKind.none and adapter.targets == ["all-linear"]


def _expert_adapter(shape: Architecture, r: int) -> int:
    """Parameters that PEFT (0.21) adds to a block's experts and their router: gate and up get one adapter of rank 2r."""
    hidden, inner, number = shape.hidden_size, shape.intermediate_size, experts(shape)
    return r * number * (2 * (hidden + 2 * inner) + inner + hidden) + r * (hidden + number) if number else 0
