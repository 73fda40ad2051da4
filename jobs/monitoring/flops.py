"""FLOPs that training needs, and what a GPU could do at most: the arithmetic of model FLOP utilisation; pure."""

import re
from dataclasses import dataclass

PEAKS: tuple[tuple[str, float], ...] = (
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
"""What names a GPU, as `torch.cuda.get_device_name` gives it, and its dense bf16 peak in TFLOP/s; the first that fits.

NVIDIA's data sheets of each, where "with sparsity" halved; PaLM (arXiv 2204.02311, appendix B) defines what is divided by it."""


def peak(device: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s; None for one that is not known here, which then has no utilisation."""
    return next((1e12 * teraflops for pattern, teraflops in PEAKS if re.search(pattern, device)), None)


@dataclass(frozen=True)
class Work:
    """What of a model's shape the cost of its training depends on."""

    weights: int
    """Weights that each token passes: all but the input embedding and the output head; of experts only those chosen."""
    head: int
    """Weights of the output head, tied or not. Only tokens that are trained pass it (jobs/model/fused_cross_entropy.py)."""
    layers: int
    width: int
    """Of attention: heads times head size."""
    frozen: bool
    """Whether only adapters are trained: gradients of the frozen weights are then not computed."""

    def flops(self, tokens: float, trained: float, squares: float) -> float:
        """FLOPs of forward and backward, without what is computed again; `squares` are the samples' squared lengths, summed.

        Every weight is one multiplication and one addition forward, and as much again for the gradient of its input and for its
        own; causal attention inside each sample costs 6 layers * width * length^2, half of what a full mask would. Padding and
        an adapter's own weights (below 1 %) count nothing. For rows of one sample, all of it trained, this is
        6 (parameters - input embedding) + 6 layers * length * width a token. Narayanan et al. 2021, arXiv 2104.04473, section 3.
        """
        each = 4 if self.frozen else 6
        return each * (self.weights * tokens + self.head * trained) + 6 * self.layers * self.width * squares
