"""launcher/check/adapter_source.py: the settings of an adapter become those of the run, and what contradicts them is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.errors import ConfigError
from conf.schema import Config
from launcher.check import localize
from tests.conftest import Compose

SETTINGS: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "/elsewhere/base", "bias": "none", "r": 8,
    "lora_alpha": 24, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"], "use_rslora": True, "use_dora": False,
    "rank_pattern": {"q_proj": 4}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": 1, "layers_pattern": None,
    "init_lora_weights": True, "inference_mode": True, "megatron_core": "megatron.core", "loftq_config": {},
}  # fmt: skip


def adapter(folder: Path, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | changed))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def localized(compose: Compose, source: object, *words: str) -> Config:
    config = compose(*(words or ("adapter=lora",)), f"adapter.source={source}")
    localize.localize(config, 0)
    return config


def test_settings_are_taken(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    found = localized(compose, "mine").adapter
    assert (found.source, found.r, found.alpha, found.dropout) == (str(tmp_path / "mine"), 8, 24.0, 0.1)
    assert (found.targets, found.rslora, found.dora) == (["q_proj", "v_proj"], True, False)
    assert (found.rank_pattern, found.alpha_pattern, found.layers_to_transform) == ({"q_proj": 4}, {}, [1])


def test_the_same_value_is_no_conflict(compose: Compose, tmp_path: Path) -> None:
    source = adapter(tmp_path / "mine")
    assert localized(compose, source, "adapter=lora", "adapter.r=8", "adapter.targets=[q_proj,v_proj]").adapter.r == 8
    assert localized(compose, source, "adapter=qlora").adapter.r == 8


def test_each_other_value_is_named(compose: Compose, tmp_path: Path) -> None:
    source = adapter(tmp_path / "mine")
    with pytest.raises(ConfigError) as caught:
        localized(compose, source, "adapter=lora", "adapter.r=32", "adapter.dora=true")
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"adapter.r=32: the adapter in {source} has 8. Leave this key out")
    assert second.startswith(f"adapter.dora=true: the adapter in {source} has false")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa: it changed the base"),
        ({"target_modules": r".*\.q_proj"}, "is a regular expression"),
        ({"bias": "all"}, "bias=all"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices=[5]"),
        ({"exclude_modules": ["lm_head"]}, "exclude_modules=['lm_head']"),
        ({"some_new_kind": True}, "some_new_kind=true: Muster does not train such adapters"),
        ({"r": "many"}, "adapter_config.json cannot be read"),
        ({"rank_pattern": [1]}, "adapter_config.json cannot be read"),
    ],
)
def test_what_cannot_be_trained_further_is_refused(
    compose: Compose, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    source = adapter(tmp_path / "mine", **changed)
    with pytest.raises(ConfigError) as caught:
        localized(compose, source)
    assert str(caught.value).startswith(f"adapter.source={source}: ") and message in str(caught.value)


def test_an_adapter_that_is_not_there_is_refused(compose: Compose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter.source=owner/adapter: .* hf download owner/adapter"):
        localized(compose, "owner/adapter")
    (adapter(tmp_path / "mine") / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no adapter_model.safetensors"):
        localized(compose, tmp_path / "mine")


def test_one_in_the_cache_of_the_hub_is_found(compose: Compose, tmp_path: Path) -> None:
    repository = tmp_path / "hub/models--owner--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots").mkdir()
    adapter(repository / "snapshots/abc")
    config = localized(compose, "owner/adapter", "adapter=lora", f"cluster.hf_home={tmp_path}")
    assert config.adapter.source == str(repository / "snapshots/abc")
