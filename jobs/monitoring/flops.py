"""Counts the FLOPs of a training step and knows the peak FLOP/s of GPUs: model FLOP utilization is their ratio over time."""

import re
from dataclasses import dataclass

from torch import nn

from jobs.model import block_sizes, unwrap

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500),
    (r"\bB200\b", 2250),
    (r"\bH20\b", 148),
    (r"\bH[12]00 NVL\b", 835),
    (r"\bH100 PCIe\b", 756),
    (r"\b(H100|H200|H800|GH200)\b", 989.4),
    (r"\b(A100|A800)\b", 312),
    (r"\bL40S\b", 362),
    (r"\bA10\b", 125),
    (r"\bL4\b", 121),
)
"""(regular expression for the name that `torch.cuda.get_device_name` returns, dense bf16 peak in TFLOP/s). First match wins.

From NVIDIA's data sheets; figures "with sparsity" are halved. PaLM (arXiv 2204.02311, appendix B) defines the utilization."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s. None for a GPU that is not in the table: it gets no utilization figure."""
    return next((1e12 * tflops for pattern, tflops in PEAK_TFLOPS if re.search(pattern, device_name)), None)


@dataclass(frozen=True)
class ModelFlops:
    """The numbers of a model that decide how many FLOPs its training needs. `count_weights` reads them from the model."""

    weights: int
    """Weights that every token passes: all except the input embedding and the output head. For a mixture of experts, only the
    experts that a token passes count."""
    head_weights: int
    """Weights of the output head, tied to the embedding or not. Only trained tokens pass through it
    (jobs/model/fused_cross_entropy.py)."""
    layers: int
    attention_width: int
    """Number of attention heads times head size."""
    frozen: bool
    """Only adapters are trained. The gradients of the frozen weights are then not computed."""

    def training(self, *, tokens: float, trained_tokens: float, squared_lengths: float) -> float:
        """FLOPs of forward and backward, without recomputation. `squared_lengths` is the sum of length^2 over all samples.

        A weight costs one multiplication and one addition per token in forward, the same for the gradient of its input, and
        the same for its own gradient: 6 FLOPs, or 4 if it is frozen. Causal attention inside a sample costs
        6 layers * width * length^2, half of what a full mask would cost. Padding and the adapter's own weights (below 1 %)
        are not counted. With one sample per row and all tokens trained, this is
        6 (parameters - input embedding) + 6 layers * length * width per token.
        Source: Narayanan et al. 2021, arXiv 2104.04473, section 3.
        """
        per_weight = 4 if self.frozen else 6
        matrices = per_weight * (self.weights * tokens + self.head_weights * trained_tokens)
        return matrices + 6 * self.layers * self.attention_width * squared_lengths


def count_weights(model: nn.Module, *, frozen: bool) -> ModelFlops:
    """Count the weights of a causal language model that is not sharded yet; meta tensors are enough.

    `frozen`: only adapters are trained, so parameters with requires_grad are adapter weights and are not counted.
    """
    language_model = unwrap.causal_lm(model)
    text_config = language_model.config.get_text_config()
    head = language_model.get_output_embeddings()
    while hasattr(head, "base_layer"):  # the head may be wrapped by an adapter
        head = head.base_layer
    embedding = language_model.get_input_embeddings()
    embedding, head = (getattr(module, "original_module", module) for module in (embedding, head))  # trained as a copy
    head_weight = head.weight if head is not None else None
    seen = {id(embedding.weight), id(head_weight)}
    experts_per_token = getattr(text_config, "num_experts_per_tok", None) or 1
    weights = 0
    for module in language_model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or (frozen and parameter.requires_grad):
                continue
            seen.add(id(parameter))
            if isinstance(module, nn.Linear) and parameter is getattr(module, "weight", None):
                # a quantized weight is packed, so its number of elements is smaller than that of the matrix
                weights += module.in_features * module.out_features
            elif parameter.dim() == 3:  # the experts of a layer are one tensor: (experts, ., .)
                weights += int(parameter.numel() * experts_per_token / parameter.shape[0])
            else:
                weights += parameter.numel()
    sizes = block_sizes.of(text_config)
    head_size = sizes.head_dim or (sizes.hidden_size // sizes.num_attention_heads)
    return ModelFlops(
        weights=weights,
        head_weights=head_weight.numel() if head_weight is not None else 0,
        layers=text_config.num_hidden_layers,
        attention_width=sizes.num_attention_heads * head_size,
        frozen=frozen,
    )
