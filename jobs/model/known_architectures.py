"""Lists the classes of transformers with a structure that Muster's fused operations replace.

The forwards of all listed classes were compared in transformers 5.17, 5.20, 5.22, 5.23 and 5.24. Other classes are tried on
stub modules instead (`fused_cross_entropy`, `fused_ops`). tests/jobs/model/test_known_architectures.py runs that trial on
listed classes too, so that a change in transformers is noticed.
"""

from typing import Any

from torch import nn

PLAIN_HEADS = frozenset(
    f"{family}ForCausalLM"
    for family in (
        *(
            "Llama",
            "Mistral",
            "Ministral",
            "Ministral3",
            "Mixtral",
            "Qwen2",
            "Qwen2Moe",
            "Qwen3",
            "Qwen3Moe",
            "Qwen3Next",
        ),
        *("Gemma", "Phi", "Phi3", "Phimoe", "Olmo", "Olmo2", "Olmo3", "Olmoe", "SmolLM3", "Glm", "Glm4", "Glm4Moe"),
        *("DeepseekV2", "DeepseekV3", "GptOss", "StableLm", "Starcoder2", "SeedOss", "Ernie4_5", "HunYuanDenseV1"),
        *("Exaone4", "Nemotron", "Apertus", "Arcee", "BitNet", "Helium"),
    )
)
"""Models that compute `logits = lm_head(hidden)` and nothing else."""

LOGIT_CHANGES: dict[str, tuple[str, float | None]] = {
    "Gemma2ForCausalLM": ("final_logit_softcapping", None),
    "Gemma3ForCausalLM": ("final_logit_softcapping", None),
    "CohereForCausalLM": ("logit_scale", 1.0),
    "Cohere2ForCausalLM": ("logit_scale", 1.0),
    "GraniteForCausalLM": ("logits_scaling", 1.0),
    "GraniteMoeForCausalLM": ("logits_scaling", 1.0),
}
"""Models that scale or soft-cap their logits -> the setting in their config, and its value that changes nothing."""

GATED_MLPS = frozenset(
    f"{family}MLP"
    for family in (
        *("Llama", "Mistral", "Ministral", "Ministral3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Qwen3Next"),
        *(
            "Gemma",
            "Gemma2",
            "Gemma3",
            "Gemma4Text",
            "Olmo",
            "Olmo2",
            "Olmo3",
            "Olmoe",
            "Granite",
            "SmolLM3",
            "Glm4Moe",
        ),
        *(
            "Cohere",
            "Cohere2",
            "StableLm",
            "DeepseekV2",
            "DeepseekV3",
            "Ernie4_5",
            "HunYuanDenseV1",
            "Exaone4",
            "Helium",
        ),
    )
)
"""MLPs that compute `down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""


def has_plain_head(model: Any) -> bool | None:
    """Whether the model's logits are its output head applied to the last hidden state; None for a class that is not listed."""
    name = type(model).__name__
    if not _is_from_transformers(model):
        return None
    if name in LOGIT_CHANGES:
        setting, neutral = LOGIT_CHANGES[name]
        return bool(getattr(model.config, setting) == neutral)
    return True if name in PLAIN_HEADS else None


def is_gated_mlp(module: nn.Module) -> bool | None:
    """True for an MLP in GATED_MLPS; None for a class that is not listed."""
    return True if _is_from_transformers(module) and type(module).__name__ in GATED_MLPS else None


def _is_from_transformers(module: nn.Module) -> bool:
    """Whether the module runs transformers' own code: not a class of the same name from a model folder, nor a replaced forward."""
    return type(module).__module__.startswith("transformers.models.") and "forward" not in vars(module)
