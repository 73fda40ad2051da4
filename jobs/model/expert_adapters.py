"""Says what each LoRA adapter on a matrix of experts adds to which weight, for merging it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from jobs.tensor_io.wrapper_names import without_wrappers


@dataclass(frozen=True)
class ExpertAdapter:
    """One adapter that PEFT has put on a parameter of a module (its `ParamWrapper`)."""

    weight: str
    """Name of the weight in the base model: `model.layers.0.mlp.experts.gate_up_proj`."""
    scale: float
    experts: int
    """1 for a weight of two dimensions."""
    inputs_first: bool
    """The weight is stored as (experts, inputs, outputs), not as (experts, outputs, inputs)."""

    def update(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """What is added to the weight, in its shape. a: (experts * rank, inputs), b: (outputs, rank * experts), of training."""
        if self.experts == 1:
            return b @ a * self.scale
        per_expert_a = a.reshape(self.experts, -1, a.shape[1])  # (experts, rank, inputs)
        per_expert_b = b.reshape(b.shape[0], -1, self.experts).permute(2, 0, 1)  # (experts, outputs, rank)
        update = per_expert_b @ per_expert_a * self.scale
        return update.transpose(1, 2) if self.inputs_first else update


def find(meta_model: nn.Module) -> dict[str, ExpertAdapter]:
    """Name of the wrapper -> its adapter. `meta_model` has adapters, and may be without weights.

    The adapter's own weights are called NAME.lora_A.default.weight and NAME.lora_B.default.weight, also in a checkpoint.
    """
    from peft.tuners.lora import ParamWrapper

    wrappers: list[tuple[str, Any]] = [
        (name, module) for name, module in meta_model.named_modules() if isinstance(module, ParamWrapper)
    ]
    found = {}
    for name, wrapper in wrappers:
        (adapter,) = wrapper.lora_A.keys()
        key = without_wrappers(f"{name}.lora_A.{adapter}.weight").partition(".lora_A.")[0]
        module = without_wrappers(f"{name}.base_layer.{wrapper.parameter_name}")
        is_swapped = wrapper._did_swap_in_out_features
        found[key] = ExpertAdapter(
            module, float(wrapper.scaling[adapter]), wrapper.num_experts, wrapper.num_experts > 1 and not is_swapped
        )
    return found
