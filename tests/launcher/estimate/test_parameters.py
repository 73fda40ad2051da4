"""launcher/estimate/parameters.py: counts equal those of transformers and PEFT."""

from typing import Any

import pytest

from conf.choices import AdapterKind
from conf.schema import Adapter
from launcher.estimate.parameters import count
from tests.conftest import ROOT, Compose
from tests.shapes import FAMILIES, adapted, built, small

NAMED = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml") if "architecture:" in path.read_text())
TARGETS = (["all-linear"], ["q_proj", "v_proj"], ["self_attn.o_proj", "k_proj"], ["q_proj", "lm_head"])


def sizes(model: Any, trained: bool = False) -> list[int]:
    return [item.numel() for item in model.parameters() if item.requires_grad or not trained]


@pytest.mark.parametrize("name", NAMED)
def test_every_named_model_has_the_parameters_that_transformers_builds(compose: Compose, name: str) -> None:
    shape = compose(f"model={name}").model.architecture
    assert shape
    model = built(shape)
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
