"""Bytes of activations that forward saves for backward, and of logits and loss; pure.

"Bytes per token" are of one rank. With tensor parallelism they are of the rank's part of a block.
"""

from dataclasses import replace
from enum import Enum

from conf.batch import micro_batch_limit, split
from conf.choices import AdapterKind, Checkpointing, Float8, Precision
from conf.schema import Config
from conf.schema_model import Architecture
from launcher.estimate.blocks import Block, head_dim, largest, values_of
from launcher.estimate.layer_kinds import norms_heads
from launcher.estimate.parameters import Counts, on_experts, targets

CHUNK, PARTS = 2**28, 8
"""From jobs/model/fused_cross_entropy.py: logits that exist at the same time, and chunks of a head with an adapter."""


class Loss(Enum):
    """How the output head and cross entropy are computed."""

    fused = "fused"
    """As jobs/model/fused_cross_entropy.py does: in chunks of tokens, with the gradients computed in forward."""
    liger = "liger"
    """As Liger's fused_linear_cross_entropy.py does: the same, in chunks with as many logits as there are hidden numbers."""
    plain = "plain"
    """All logits exist at the same time."""


def shape_of(config: Config) -> Architecture:
    assert config.model.architecture is not None  # `memory.estimate` returns None without it
    return config.model.architecture


def width_of(config: Config) -> int:
    """Bytes of one number in the compute precision."""
    return 4 if config.train.precision is Precision.fp32 else 2


def _tokens(config: Config) -> tuple[int, int]:
    """Most tokens of a rank (in a training micro batch, in an evaluation batch), padded as jobs/data/batches.py does."""
    length = -(-config.data.max_length // 8) * 8 // config.parallel.context_ranks
    return split(config, config.cluster.train.ranks)[0] * length, micro_batch_limit(config) * length


def _local(config: Config) -> Architecture:
    """A rank's part of the model's shape: tensor parallelism divides heads and intermediate size, not the hidden size."""
    shape, ranks = shape_of(config), config.parallel.tensor_ranks
    return replace(
        shape,
        intermediate_size=shape.intermediate_size // ranks,
        num_attention_heads=shape.num_attention_heads // ranks,
        num_key_value_heads=shape.num_key_value_heads // ranks,
        extra=shape.extra | {"head_dim": head_dim(shape)},
    )


def _block(config: Config) -> Block:
    """A rank's part of the largest block."""
    return largest(_local(config))


def activation_bytes(config: Config, *, fused_kernels: bool, compiled: bool = False) -> float:
    """Bytes that a rank saves for backward, plus the gradients inside the one block that is being differentiated.

    Formulas: Korthikanti et al. 2022 (arXiv 2205.05198, section 4), adapted to RMSNorm, SwiGLU, grouped-query attention and
    attention kernels that save no scores. Counted tensor by tensor in transformers' Llama, and equal to what autograd saves
    (tests/launcher/estimate/test_activations.py).
    """
    shape, width, tokens, one = _local(config), width_of(config), _tokens(config)[0], _block(config)
    mode, layers = config.train.activation_checkpointing, shape.num_hidden_layers
    block = saved_by_block(config, fused_kernels=fused_kernels)
    final = (4 + 2 * width) * shape.hidden_size  # the norm before the output head, and the head's input
    inner = one.dense_inner + one.chosen * one.expert_inner
    backward = width * ((3 if one.gated else 2) * inner + 2 * shape.hidden_size)
    recomputes = mode.recomputes
    whole_blocks = 1 if recomputes else layers  # recomputed, one block at a time has all of its activations
    inputs = layers if recomputes else 0
    if mode is Checkpointing.offload:
        inputs = min(2, layers)  # on the GPU only while they are copied, two at a time
    kept = float(inputs * width * shape.hidden_size)
    if mode is Checkpointing.selective:
        kept += layers * kept_by_selection(config, compiled=compiled)
    # PEFT adds an expert's adapter to its weight in forward, so a block saves a new copy of all expert weights
    merged = 3 * one.experts * one.expert_inner * shape.hidden_size if on_experts(one, config.adapter) else 0
    return tokens * (kept + whole_blocks * block + final + backward) + whole_blocks * width * merged


def offloaded_bytes(config: Config) -> float:
    """Bytes of block inputs that a rank keeps in host memory with `train.activation_checkpointing=offload`."""
    if config.train.activation_checkpointing is not Checkpointing.offload:
        return 0
    shape = shape_of(config)
    return float(shape.num_hidden_layers * width_of(config) * shape.hidden_size * _tokens(config)[0])


def kept_by_selection(config: Config, *, compiled: bool) -> float:
    """Bytes per token that `selective` keeps of one block besides its input: attention, and every second matrix product.

    jobs/model/activation_checkpointing.py counts the products in the order in which they run. In a compiled block the last
    one is not kept, because no gradient needs it.
    """
    shape, width, block = _local(config), width_of(config), _block(config)
    adapted = [] if config.adapter.kind is AdapterKind.none else targets(block, config.adapter)
    products: list[int] = []
    for name, linear in block.linears.items():
        products.append(linear.outputs)
        if name in adapted:  # PEFT: x @ A, then @ B
            products += [config.adapter.r, linear.outputs]
    if block.experts:
        products.append(block.experts)  # the router; products of experts are another operation and never kept
    if compiled and not block.experts:
        products[-1] = 0
    attention = block.linears[_output_of_attention(block)].inputs
    return width * (sum(products[::2]) + attention) + 4 * shape.num_attention_heads


def _output_of_attention(block: Block) -> str:
    return next(name for name, linear in block.linears.items() if linear.reads == "attention")


def saved_by_block(config: Config, *, fused_kernels: bool) -> float:
    """Bytes per token that one decoder block saves for backward, without activation checkpointing.

    Equal to what autograd saves for llama, mistral, qwen2 and qwen3. For other families it is an estimate by the same rules.
    """
    shape, block = _local(config), _block(config)
    width, hidden = width_of(config), shape.hidden_size
    # a norm saves its input in fp32 and the inverse root; a trained norm also saves the factor of its weight
    norm = 4 + (width if config.adapter.kind is AdapterKind.none else 0)
    norms = 2 * (width if fused_kernels else norm) * hidden + 2 * 4
    if norms_heads(shape.model_type, values_of(shape)):
        norms += norm * (block.query + block.key) + 4 * (shape.num_attention_heads + shape.num_key_value_heads)
    # q, k, v, output; log-sum-exp in fp32
    attention = width * (block.query + block.key + 2 * block.value) + 4 * shape.num_attention_heads
    attention += width * (block.linears[_output_of_attention(block)].inputs - block.value)
    parts = 2 if fused_kernels or not block.gated else 3  # gate, up; eager also silu(gate)
    mlp = width * parts * block.dense_inner
    if block.experts:  # each selected expert also copies its input, and saves product and output
        mlp += block.chosen * width * (parts * block.expert_inner + block.expert_inner + 2 * hidden)
    return attention + norms + mlp + _saved_by_linears(config, block, fused_kernels=fused_kernels)


def _saved_by_linears(config: Config, block: Block, *, fused_kernels: bool) -> float:
    """Bytes per token of the inputs that linear layers save: of trained weights, or of adapters with what A computes.

    - With dropout each adapter saves its own input after dropout, and a mask, instead of the input it shares with others.
    - The input of o_proj is attention's output, which is counted there.
    - With `train.float8=tensorwise` a compiled block saves the input in 8 bits, which the weight's gradient uses too.
    """
    adapter = config.adapter
    width = 1 if fused_kernels and config.train.float8 is Float8.tensorwise else width_of(config)
    names, full = targets(block, adapter), adapter.kind is AdapterKind.none
    total: float = 0
    sizes = {linear.reads: linear.inputs for linear in block.linears.values() if linear.reads != "attention"}
    if block.experts and "MLP input" not in sizes:
        sizes["MLP input"] = shape_of(config).hidden_size
    adapted = {block.linears[name].reads for name in names}
    for tensor, size in sizes.items():
        if full or (tensor in adapted and not adapter.dropout):
            total += width * size
    if not full:
        dropped = width + 1 if adapter.dropout else 0
        total += sum(width * adapter.r + dropped * block.linears[name].inputs for name in names)
    return total


def logit_bytes(config: Config, counts: Counts, *, loss: Loss, compiled: bool = False) -> float:
    """Peak bytes of output head and loss, with the gradients that wait for backward. Counts every token as trained."""
    shape, width, (tokens, evaluated) = shape_of(config), width_of(config), _tokens(config)
    states = width * tokens * shape.hidden_size
    if loss is Loss.plain:
        # log-probabilities, their gradient and that of the logits, in fp32; evaluation has no gradients
        return max(3 * 4 * tokens, (width + 8) * evaluated) * shape.vocab_size
    if loss is Loss.liger:
        return 2 * states + 4 * tokens * shape.hidden_size + (0 if counts.frozen else width * counts.head)
    if counts.trained_root and counts.frozen:  # an adapter on the head: chunks are recomputed in backward
        return states + 3 * 4 * -(-tokens // PARTS) * shape.vocab_size
    chunk = min(tokens, max(1, CHUNK // shape.vocab_size)) * shape.vocab_size
    # logits and their gradient; without one fused kernel there are three more copies in fp32 between them
    scored = chunk * (2 * width if compiled else width * (width < 4) + 3 * 4)
    if tokens * shape.vocab_size > chunk:
        scored += width * chunk  # the gradient of the previous chunk
    if counts.frozen:
        return 2 * states + scored
    return 2 * states + 4 * counts.head + max(scored, width * (chunk + counts.head))
