"""What a forward pass leaves for the backward one, in bytes: activations of the blocks, logits and their loss; pure."""

from conf.batch import split
from conf.schema import AdapterKind, Architecture, Config, Precision
from launcher.counting import Counts, experts, head_dim, linears, on_experts, targets


def shape_of(config: Config) -> Architecture:
    assert config.model.architecture is not None  # `memory.estimate` returned before
    return config.model.architecture


def width_of(config: Config) -> int:
    """Bytes of a number in the precision of compute."""
    return 4 if config.train.precision is Precision.fp32 else 2


def _tokens(config: Config) -> tuple[int, int]:
    """Tokens a rank holds at most (in a training micro batch, in an evaluation batch), padded as jobs/data.py does."""
    length = -(-config.data.max_length // 8) * 8
    world = config.cluster.train.nodes * config.cluster.train.ranks_per_node
    return split(config, world)[0] * length, config.train.micro_batch * length


def activation_bytes(config: Config, *, fused_kernels: bool) -> float:
    """Saved for backward, plus the gradients inside the one block that is being differentiated.

    Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for RMSNorm, SwiGLU, grouped queries and attention that keeps
    no scores; counted tensor by tensor in transformers' Llama, and equal to what autograd saves (tests/test_activations.py).
    """
    shape, width, tokens = shape_of(config), width_of(config), _tokens(config)[0]
    block = saved_by_block(config, fused_kernels=fused_kernels)
    final = (4 + 2 * width) * shape.hidden_size  # the norm before the output head, and the head's input
    backward = width * (3 * shape.intermediate_size + 2 * shape.hidden_size)
    layers, whole = shape.num_hidden_layers, 1 if config.train.activation_checkpointing else shape.num_hidden_layers
    kept = layers * width * shape.hidden_size if config.train.activation_checkpointing else 0
    merged = 3 * experts(shape) * shape.intermediate_size * shape.hidden_size if on_experts(config.adapter) else 0
    # PEFT adds an expert's adapter to its weight, so that a block keeps all of them anew
    return tokens * (kept + whole * block + final + backward) + whole * width * merged


def saved_by_block(config: Config, *, fused_kernels: bool) -> float:
    """Bytes a token that one decoder block saves for backward, without checkpointing."""
    shape = shape_of(config)
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
    return attention + norms + mlp + _saved_by_linears(config, shape)


def _saved_by_linears(config: Config, shape: Architecture) -> float:
    """Bytes a token of inputs: those of trained weights, or those that adapters read, and what an adapter's A makes of them.

    Under dropout every adapter keeps its own dropped input and a mask in place of the shared one. The attention's output is
    kept already.
    """
    width, adapter = width_of(config), config.adapter
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


def logit_bytes(config: Config, counts: Counts, *, fused_loss: bool) -> float:
    """Peak of output head and loss. jobs/loss.py: log-probabilities, their gradient and that of the logits, each whole in fp32.

    Evaluation keeps logits, their fp32 copy and log-probabilities. A fused loss works on chunks of as many logits as there
    are hidden numbers, and makes the gradients of hidden states and head at once (Liger's fused_linear_cross_entropy.py).
    """
    shape, width, (tokens, evaluated) = shape_of(config), width_of(config), _tokens(config)
    if fused_loss:
        return (2 * width + 4) * tokens * shape.hidden_size + (0 if counts.frozen else width * counts.head)
    return max(3 * 4 * tokens, (width + 8) * evaluated) * shape.vocab_size
