"""Listed classes of transformers compute what the lists say: tried on the installed version with stub modules."""

import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from jobs.model import fused_cross_entropy, fused_ops, known_architectures
from tests.jobs.networks import network

FAMILIES = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str)}
LISTED = sorted(known_architectures.PLAIN_HEADS | known_architectures.LOGIT_CHANGES.keys())


class Head(nn.Module):
    pass


def without_weights(name: str) -> nn.Module:
    """A causal language model of this class with a config, a base model and a head, but none of them with weights."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(FAMILIES[name])
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    assert model_class.__name__ == name
    model = model_class.__new__(model_class)
    nn.Module.__init__(model)
    model.config, model.lm_head = config.get_text_config(), Head()
    setattr(model, model_class.base_model_prefix, Head())
    model.vocab_size = 8
    model.logit_scale = getattr(config, "logit_scale", None)
    return model


@pytest.mark.parametrize("name", LISTED)
def test_listed_heads_are_what_the_list_says(name: str) -> None:
    model = without_weights(name)
    assert known_architectures.has_plain_head(model) is fused_cross_entropy._returns_head_output(model, model.lm_head)
    if name in known_architectures.LOGIT_CHANGES:
        setting, neutral = known_architectures.LOGIT_CHANGES[name]
        setattr(model.config, setting, neutral)
        model.logit_scale = 1.0
        assert known_architectures.has_plain_head(model)
        assert fused_cross_entropy._returns_head_output(model, model.lm_head)
        setattr(model.config, setting, 7.0)
        model.logit_scale = 7.0
        assert not known_architectures.has_plain_head(model)
        assert not fused_cross_entropy._returns_head_output(model, model.lm_head)


@pytest.mark.parametrize("name", sorted(known_architectures.GATED_MLPS))
def test_listed_mlps_are_gated(name: str) -> None:
    family = name.removesuffix("MLP").removesuffix("Text")
    model_class = type(without_weights(f"{family}ForCausalLM"))
    mlp_class = getattr(sys.modules[model_class.__module__], name)  # other families have a class of this name too
    mlp = mlp_class.__new__(mlp_class)
    nn.Module.__init__(mlp)
    for projection in fused_ops.PROJECTIONS:
        setattr(mlp, projection, Head())
    mlp.act_fn = nn.SiLU()
    assert known_architectures.is_gated_mlp(mlp)
    assert fused_ops._computes_gated_mlp(mlp)


def test_a_replaced_forward_is_not_trusted() -> None:
    model = network()
    assert known_architectures.has_plain_head(model) is True
    model.forward = lambda **_: torch.zeros(1)
    assert known_architectures.has_plain_head(model) is None


def test_a_class_of_the_same_name_from_elsewhere_is_not_trusted() -> None:
    impostor = type("LlamaForCausalLM", (nn.Module,), {})()
    assert known_architectures.has_plain_head(impostor) is None
