"""What a forward pass leaves for the backward one, in bytes: activations of the blocks, logits and their loss; pure."""

from dataclasses import replace
from enum import Enum

from conf.batch import rows_at_once, split
from conf.choices import AdapterKind, Checkpointing, Float8, Precision
from conf.schema import Architecture, Config
from launcher.estimate.parameters import Counts, experts, head_dim, linears, on_experts, targets

CHUNK, PARTS = 2**28, 8
"""jobs/model/fused_cross_entropy.py: logits that exist at once, and chunks of a head that has an adapter."""


class Loss(Enum):
    """How output head and cross entropy are computed."""

    fused = "fused"
    """As jobs/model/fused_cross_entropy.py does: chunks of tokens, gradients made on the way forward."""
    liger = "liger"
    """Liger's fused_linear_cross_entropy.py: likewise, in chunks of as many logits as there are hidden numbers."""
    plain = "plain"
    """All logits at once."""


def shape_of(config: Config) -> Architecture:
    assert config.model.architecture is not None  # `memory.estimate` returned before
    return config.model.architecture


def width_of(config: Config) -> int:
    """Bytes of a number in the precision of compute."""
    return 4 if config.train.precision is Precision.fp32 else 2


def _tokens(config: Config) -> tuple[int, int]:
    """Tokens a rank holds at most (in a training micro batch, in an evaluation batch), padded as jobs/data/batches.py does."""
    length = -(-config.data.max_length // 8) * 8 // config.parallel.context_ranks
    world = config.cluster.train.nodes * config.cluster.train.ranks_per_node
    return split(config, world)[0] * length, rows_at_once(config) * length


def _local(config: Config) -> Architecture:
    """A rank's part of a block's shape: ranks that share its matrices share heads and inner width, not the hidden size."""
    shape, ranks = shape_of(config), config.parallel.tensor_ranks
    return replace(
        shape,
        intermediate_size=shape.intermediate_size // ranks,
        num_attention_heads=shape.num_attention_heads // ranks,
        num_key_value_heads=shape.num_key_value_heads // ranks,
        extra=shape.extra | {"head_dim": head_dim(shape)},
    )


def activation_bytes(config: Config, *, fused_kernels: bool, compiled: bool = False) -> float:
    """Saved for backward, plus the gradients inside the one block that is being differentiated.

    Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for RMSNorm, SwiGLU, grouped queries and attention that keeps
    no scores; counted tensor by tensor in transformers' Llama, and equal to what autograd saves
    (tests/launcher/estimate/test_activations.py).
    """
    shape, width, tokens = _local(config), width_of(config), _tokens(config)[0]
    mode = config.train.activation_checkpointing
    block = saved_by_block(config, fused_kernels=fused_kernels)
    final = (4 + 2 * width) * shape.hidden_size  # the norm before the output head, and the head's input
    backward = width * (3 * shape.intermediate_size + 2 * shape.hidden_size)
    layers, whole = shape.num_hidden_layers, 1 if mode.recomputes else shape.num_hidden_layers
    # inputs of recomputed blocks; offloaded ones are here only while they are copied, two at a time
    inputs = 0 if not mode.recomputes else min(2, layers) if mode is Checkpointing.offload else layers
    kept = float(inputs * width * shape.hidden_size)
    if mode is Checkpointing.selective:
        kept += layers * kept_by_selection(config, compiled=compiled)
    merged = 3 * experts(shape) * shape.intermediate_size * shape.hidden_size if on_experts(config.adapter) else 0
    # PEFT adds an expert's adapter to its weight, so that a block keeps all of them anew
    return tokens * (kept + whole * block + final + backward) + whole * width * merged


def offloaded_bytes(config: Config) -> float:
    """Inputs of a rank's blocks in host memory, under `offload`."""
    if config.train.activation_checkpointing is not Checkpointing.offload:
        return 0
    shape = shape_of(config)
    return float(shape.num_hidden_layers * width_of(config) * shape.hidden_size * _tokens(config)[0])


def kept_by_selection(config: Config, *, compiled: bool) -> float:
    """Bytes a token that `selective` keeps of one block beside its input: attention, and every second matrix product.

    jobs/model/prepare.py counts products as they come. Compiled, the last one is not kept: no gradient needs it.
    """
    shape, width = _local(config), width_of(config)
    adapted = [] if config.adapter.kind is AdapterKind.none else targets(shape, config.adapter)
    query = shape.num_attention_heads * head_dim(shape)
    products: list[int] = []
    for name, (outputs, _, _) in linears(shape).items():
        products.append(outputs)
        if name in adapted:  # PEFT: x @ A, then @ B
            products += [config.adapter.r, outputs]
    if experts(shape):
        products.append(experts(shape))  # the router; experts are products of another kind, and not kept
    if compiled and not experts(shape):
        products[-1] = 0
    return width * (sum(products[::2]) + query) + 4 * shape.num_attention_heads


def saved_by_block(config: Config, *, fused_kernels: bool) -> float:
    """Bytes a token that one decoder block saves for backward, without checkpointing."""
    shape = _local(config)
    width, hidden, inner = width_of(config), shape.hidden_size, shape.intermediate_size
    query, key = (heads * head_dim(shape) for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    # a norm keeps its input in fp32 with the inverse root, and what its weight multiplies if that is trained
    norm = 4 + (width if config.adapter.kind is AdapterKind.none else 0)
    norms = 2 * (width if fused_kernels else norm) * hidden + 2 * 4
    if shape.model_type == "qwen3":
        norms += norm * (query + key) + 4 * (shape.num_attention_heads + shape.num_key_value_heads)
    attention = width * (2 * query + 2 * key) + 4 * shape.num_attention_heads  # q, k, v, output; log-sum-exp in fp32
    mlp = width * (2 if fused_kernels else 3) * inner  # gate, up; eager also silu(gate)
    if experts(shape):  # each chosen expert also gathers its input, and keeps product and output
        mlp = int(shape.extra.get("num_experts_per_tok", 2)) * (mlp + width * (inner + 2 * hidden))
    return attention + norms + mlp + _saved_by_linears(config, shape, fused_kernels=fused_kernels)


def _saved_by_linears(config: Config, shape: Architecture, *, fused_kernels: bool) -> float:
    """Bytes a token of inputs: those of trained weights, or those that adapters read, and what an adapter's A makes of them.

    Under dropout every adapter keeps its own dropped input and a mask in place of the shared one. The attention's output is
    kept already. Of products in 8 bits with one scale the compiler keeps the input in 8 bits, which a weight's gradient takes too.
    """
    adapter = config.adapter
    width = 1 if fused_kernels and config.train.float8 is Float8.tensorwise else width_of(config)
    names = targets(shape, adapter)
    found, full = 0, adapter.kind is AdapterKind.none
    for users, size in (
        ({"q_proj", "k_proj", "v_proj"}, shape.hidden_size),
        ({"gate_proj", "up_proj"}, shape.hidden_size),
        ({"down_proj"}, 0 if experts(shape) else shape.intermediate_size),
    ):
        if full or (users & set(names) and not adapter.dropout):
            found += width * size
    if not full:
        dropped = width + 1 if adapter.dropout else 0
        found += sum(width * adapter.r + dropped * linears(shape)[name][1] for name in names)
    return found


def logit_bytes(config: Config, counts: Counts, *, loss: Loss, compiled: bool = False) -> float:
    """Peak of output head and loss, all of whose tokens are trained, with the gradients that wait for backward."""
    shape, width, (tokens, evaluated) = shape_of(config), width_of(config), _tokens(config)
    states = width * tokens * shape.hidden_size
    if loss is Loss.plain:
        # log-probabilities, their gradient and that of the logits, in fp32; evaluation has no gradients
        return max(3 * 4 * tokens, (width + 8) * evaluated) * shape.vocab_size
    if loss is Loss.liger:
        return 2 * states + 4 * tokens * shape.hidden_size + (0 if counts.frozen else width * counts.head)
    if counts.trained_root and counts.frozen:  # an adapter on the head: parts are computed again in backward
        return states + 3 * 4 * -(-tokens // PARTS) * shape.vocab_size
    chunk = min(tokens, max(1, CHUNK // shape.vocab_size)) * shape.vocab_size
    # logits and their gradient; one kernel keeps what is between in registers, else there are three more copies in fp32
    scored = chunk * (2 * width if compiled else width * (width < 4) + 3 * 4)
    if tokens * shape.vocab_size > chunk:
        scored += width * chunk  # the gradient of the chunk before
    if counts.frozen:
        return 2 * states + scored
    return 2 * states + 4 * counts.head + max(scored, width * (chunk + counts.head))
