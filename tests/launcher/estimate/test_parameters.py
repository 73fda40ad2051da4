"""launcher/estimate/parameters.py: counts equal those of transformers and PEFT."""

from typing import Any

import pytest

from conf.choices import AdapterKind
from conf.schema_model import Architecture
from conf.schema_training import Adapter
from launcher.estimate.parameters import count
from tests.conftest import ROOT, Compose
from tests.launcher.estimate.test_families import on_meta
from tests.shapes import FAMILIES, adapted, built, small

NAMED = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml") if "architecture:" in path.read_text())
TARGETS = (["all-linear"], ["q_proj", "v_proj"], ["self_attn.o_proj", "k_proj"], ["q_proj", "lm_head"])


PUBLISHED = {
    "gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984, "llama1b": 1_235_814_400, "llama3b": 3_212_749_824,
    "llama8b": 8_030_261_248, "llama70b": 70_553_706_496, "llama405b": 405_853_388_800, "mistral7b": 7_248_023_552,
    "mistral_nemo": 12_247_782_400, "mistral_small": 23_572_403_200, "mixtral8x7b": 46_702_792_704, "olmo2_7b": 7_298_617_344,
    "phi4": 14_659_507_200, "qwen0_5b": 494_032_768, "qwen1_5b": 1_543_714_304, "qwen7b": 7_615_616_512,
    "qwen14b": 14_770_033_664, "qwen32b": 32_763_876_352, "qwen72b": 72_706_203_648, "qwen3_0_6b": 596_049_920,
    "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360, "qwen3_32b": 32_762_123_264, "qwen3_30b_a3b": 30_532_122_624,
    "smollm3": 3_075_098_624,
}  # fmt: skip
"""Parameters of the published weights."""
MULTIMODAL = {
    "gemma3_4b": 4_300_079_472, "gemma3_12b": 12_187_325_040, "gemma3_27b": 27_432_406_640, "ministral3_8b": 8_918_026_240,
    "llama4_scout": 108_641_793_536, "qwen3_5_9b": 9_409_813_744,
}  # fmt: skip
"""The same of multimodal models, with their towers in bf16; Qwen 3.5 without its layer that predicts several tokens."""


def test_every_named_model_has_its_published_size(compose: Compose) -> None:
    assert {*PUBLISHED, *MULTIMODAL} == {*NAMED} - {"tiny"}
    for name, published in (PUBLISHED | MULTIMODAL).items():
        shape = compose(f"model={name}").model.architecture
        assert shape
        counts = count(shape, Adapter())
        assert counts and round((published - counts.total) * 2 / 2**30, 3) == shape.tower_gib, (name, counts)


def described(shape: Architecture) -> Any:
    """A shape as a config of transformers."""
    from transformers import AutoConfig

    fields = {name: value for name, value in vars(shape).items() if name not in ("model_type", "tower_gib", "extra")}
    return AutoConfig.for_model(shape.model_type, **fields, **shape.extra)


def sizes(model: Any, trained: bool = False) -> list[int]:
    return [item.numel() for item in model.parameters() if item.requires_grad or not trained]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning:peft")
@pytest.mark.parametrize("name", NAMED)
def test_every_named_model_has_the_parameters_that_transformers_builds(compose: Compose, name: str) -> None:
    shape = compose(f"model={name}").model.architecture
    assert shape
    shape.num_hidden_layers = 2  # the test above counts all of them
    model = on_meta(described(shape))
    counts = count(shape, Adapter())
    assert counts
    assert (counts.total, counts.largest) == (sum(sizes(model)), max(sizes(model)))
    assert counts.block == sum(sizes(model.model.layers[0]))
    lora = count(shape, Adapter(kind=AdapterKind.lora, r=8))
    assert lora
    assert (lora.frozen, lora.trained) == (counts.total, sum(sizes(adapted(model, ["all-linear"]), trained=True)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_parameters_that_transformers_builds(family: str, tied: bool) -> None:
    shape = small(family, tied=tied)
    model = built(shape)
    counts = count(shape, Adapter())
    assert counts
    assert (counts.total, counts.largest) == (sum(sizes(model)), max(sizes(model)))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning:peft")
@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_have_the_parameters_that_peft_builds(family: str, targets: list[str]) -> None:
    counts = count(small(family), Adapter(kind=AdapterKind.lora, r=8, targets=targets))
    assert counts
    assert counts.trained == sum(sizes(adapted(built(small(family)), targets), trained=True))


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]], ids=" ".join)
def test_dora_has_the_parameters_that_peft_builds(targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    model = built(small("llama"))
    chosen = "all-linear" if targets == ["all-linear"] else targets
    lora = LoraConfig(r=8, target_modules=chosen, use_dora=True, task_type="CAUSAL_LM")
    counts = count(small("llama"), Adapter(kind=AdapterKind.lora, r=8, targets=targets, dora=True))
    assert counts
    assert counts.trained == sum(sizes(get_peft_model(model, lora), trained=True))
