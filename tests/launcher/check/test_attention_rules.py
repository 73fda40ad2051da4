"""launcher/check/attention_rules.py says of a model's attention what jobs/model/attention.py says when training starts."""

import json
from typing import Any

import pytest
from transformers import AutoConfig

from jobs.model.attention import _unsupported_feature
from launcher.check import attention_rules
from launcher.estimate import config_json
from tests.conftest import ROOT, Compose

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = json.loads((ROOT / "tests/jobs/families.json").read_text())


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        ("llama", {"head_dim": 64}, ""),
        ("llama", {"head_dim": 12}, "head size 12"),
        ("llama", {"head_dim": 64, "attention_dropout": 0.1}, "dropout"),
        ("gemma2", {"head_dim": 64}, "softcap"),
        ("gemma2", {"head_dim": 64, "attn_logit_softcapping": None}, ""),
        ("deepseek_v3", {}, "latent heads (MLA)"),
        ("gpt_oss", {"head_dim": 64}, "sinks"),
        ("qwen3_next", {"head_dim": 64}, "layer types other than full and sliding"),
    ],
)
def test_features_are_those_that_the_job_finds(family, given, expected, compose: Compose) -> None:
    fields = FAMILIES[family][1] | {"model_type": family} | given
    config = compose("model=tiny")
    config.model.architecture = config_json.architecture(fields)
    assert attention_rules.feature(config, fields) == expected
    found = {"qwen3_next": "custom code"}.get(family, expected)  # the job also looks at the model's class
    assert _unsupported_feature(AutoConfig.for_model(**fields)) == found
