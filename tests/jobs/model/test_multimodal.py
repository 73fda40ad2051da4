"""jobs/model/multimodal.py: the text of a multimodal model is found, loaded alone, and computes what the whole model does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from conf.errors import ConfigError
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.model import build, multimodal, pretrained, text_equality
from tests.conftest import Compose
from tests.jobs import families

pytestmark = pytest.mark.filterwarnings("ignore")
MULTIMODAL = [name for name, (_, values) in families.FAMILIES.items() if "text_config" in values]
TOKENS = torch.randint(3, 1000, (1, 24), generator=torch.Generator().manual_seed(0))


def on(source: Path, compose: Compose, *words: str) -> Config:
    return compose("model=hub", f"model.source={source}", *families.COMMON, *words)


def changed(source: Path, change) -> None:
    """Change the tensors of a folder: `change(tensors)` edits the dictionary in place."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def check(source: Path, compose: Compose) -> None:
    """The text alone has the logits of the whole model, as transformers loads it."""
    text = build.build(on(source, compose)).eval()
    whole = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(text(input_ids=TOKENS).logits, whole(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    "family",
    [item if item in ("gemma3", "llama4") else pytest.param(item, marks=pytest.mark.proof) for item in MULTIMODAL],
)
def test_the_text_has_the_logits_of_the_whole_model(family: str, compose: Compose, tmp_path: Path) -> None:
    families.make(tmp_path / "m", family)
    check(tmp_path / "m", compose)


def test_files_with_the_names_of_other_versions(compose: Compose, tmp_path: Path) -> None:
    families.make(tmp_path / "m", "gemma3")
    config = on(tmp_path / "m", compose)
    whole = multimodal.whole_of(build.build_on_meta(config))
    assert whole is not None

    def rename(tensors) -> None:
        names, _ = whole.in_memory(tensors)
        assert any(name != memory for name, memory in names.items())
        for name, memory in names.items():
            tensors[memory] = tensors.pop(name)

    changed(tmp_path / "m", rename)
    check(tmp_path / "m", compose)


@pytest.mark.parametrize("same", [False, True], ids=["other", "same"])
def test_a_head_that_the_files_hold_apart(same: bool, compose: Compose, tmp_path: Path) -> None:
    """The class of Mistral 3 ties by default; published models with a head of their own do not say otherwise."""
    families.make(tmp_path / "m", "mistral3")
    path = tmp_path / "m" / "config.json"
    fields = json.loads(path.read_text())
    del fields["tie_word_embeddings"]
    path.write_text(json.dumps(fields))

    def repeat(tensors) -> None:
        embedding, head = (next(name for name in tensors if part in name) for part in ("embed_tokens", "lm_head"))
        tensors[head] = tensors[embedding].clone()

    if same:
        changed(tmp_path / "m", repeat)
    assert build.build_on_meta(on(tmp_path / "m", compose)).config.tie_word_embeddings == same
    check(tmp_path / "m", compose)


def test_the_log_says_what_is_not_loaded(compose: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    families.make(tmp_path / "m", "gemma3")
    config = on(tmp_path / "m", compose)
    base = build.build_on_meta(config)
    with caplog.at_level("INFO"):
        pretrained.load(base, {}, config, World(0, 1, 0, 1, torch.device("cpu")), {})
    stored = load_file(tmp_path / "m" / "model.safetensors")
    count = sum("vision" in name or "projector" in name for name in stored)
    assert f"vision tower ({count} tensors, 0.00 GiB) stays as it is in {tmp_path / 'm'}" in caplog.text


def test_files_that_do_not_match_are_refused_and_the_remedy_works(compose: Compose, tmp_path: Path) -> None:
    families.make(tmp_path / "m", "gemma3")
    tower = next(name for name in load_file(tmp_path / "m" / "model.safetensors") if "vision" in name)
    changed(tmp_path / "m", lambda tensors: tensors.update({"mtp.layer.weight": torch.ones(2)}))
    with pytest.raises(
        ConfigError, match="mtp.layer.weight is in the files but not in the model.*model.ignore_tensors"
    ):
        build.build(on(tmp_path / "m", compose))
    words = 'model.ignore_tensors=["^mtp[.]"]'
    assert build.build(on(tmp_path / "m", compose, words))
    with pytest.raises(ConfigError, match="matches none of the"):
        build.build(on(tmp_path / "m", compose, 'model.ignore_tensors=["^nothing"]'))
    changed(tmp_path / "m", lambda tensors: tensors.pop(tower))
    with pytest.raises(ConfigError, match="vision_tower.* is in none of the files"):
        build.build(on(tmp_path / "m", compose, words))


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        (
            "llava_next",
            {"text_config": {"model_type": "bert", "hidden_size": 64, "num_attention_heads": 4}},
            "cannot be trained alone",
        ),
        ("mistral3", {"text_config": {"model_type": "t5", "d_model": 64}}, "cannot be loaded"),
        ("qwen3_vl", {"text_config": [1]}, "cannot be loaded"),
        ("gemma3", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored quantized"),
    ],
)
def test_what_cannot_be_built_is_refused(family, fields, said, compose: Compose, tmp_path: Path) -> None:
    families.make(tmp_path / "m", family)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ConfigError, match=said):
        build.build(on(tmp_path / "m", compose))


def test_a_family_that_computes_more_with_a_text_is_refused() -> None:
    """Cohere 2 Vision does not scale its logits as the model of text inside does."""
    from transformers import AutoConfig

    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model_config = AutoConfig.for_model(
        "cohere2_vision", text_config={"model_type": "cohere2", **small}, vision_config=vision
    )
    config = Config()
    config.model.source = "nowhere"
    text = multimodal.build_text(model_config, config, lambda _: "eager", torch.float32)
    whole = multimodal.whole_of(text)
    assert whole is not None
    with pytest.raises(ConfigError, match="other logits on text"):
        text_equality.require(text, whole, "nowhere")
