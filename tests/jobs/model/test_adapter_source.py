"""`adapter.source`: training goes on from the weights of an adapter, as PEFT's own model does from the same folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conf import resolve
from conf.errors import ConfigError
from conf.schema import Config
from jobs import backends, consolidate
from jobs.distributed.process_group import process_group
from jobs.model import build
from jobs.tensor_io.wrapper_names import without_wrappers
from jobs.training import loss
from launcher.check import localize
from tests.conftest import Compose, put
from tests.jobs import curves, ranks
from tests.jobs.model.test_saved_modules import LENGTHS, SMALL, base, on
from tests.jobs.networks import rows, whole
from tests.jobs.ranks import spawn

__all__ = ["base"]
RATE = 1e-2
STEADY = {"train.weight_decay": 0.0, "train.eps": 1e-3}
"""With a large eps, Adam does not blow rounding up where a gradient is almost 0."""
pytestmark = pytest.mark.filterwarnings("ignore")


def adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter as PEFT writes it, with random weights, so that it is not where a new one starts."""
    values: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | settings
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **values))
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def going_on(base: Path, compose: Compose, source: Path, *words: str) -> Config:
    """The config after launch.py has read the settings of the adapter."""
    config = on(base, compose, f"adapter.source={source}", *words)
    localize.localize(config, 0)
    return config


def of_peft(base: Path, source: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, source, is_trainable=True)


CASES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
    {"modules_to_save": ["embed_tokens", "lm_head"], "use_rslora": True},
    {"use_dora": True, "lora_dropout": 0.0},
    {"target_modules": ["up_proj"], "layers_to_transform": [0, 2]},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: " ".join(settings))
def test_the_model_is_that_of_peft(base: Path, compose: Compose, settings: dict[str, Any], tmp_path: Path) -> None:
    source = adapter(base, tmp_path / "adapter", **settings)
    ours, theirs = build.build(going_on(base, compose, source)), of_peft(base, source)
    expected = dict(theirs.named_parameters())
    assert {name for name, item in ours.named_parameters() if item.requires_grad} == {
        name for name, item in expected.items() if item.requires_grad
    }
    for name, item in ours.named_parameters():
        assert torch.equal(item, expected[name]), name
    batch = whole(rows(LENGTHS))
    with torch.no_grad():
        torch.testing.assert_close(ours(batch.input_ids).logits, theirs.eval()(batch.input_ids).logits)


def trained_by_peft(base: Path, source: Path, config: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and trained weights of three steps with PEFT and torch's AdamW alone."""
    model, batch, losses = of_peft(base, source), whole(rows(LENGTHS)), []
    trained = [item for item in model.parameters() if item.requires_grad]
    betas = (config.train.beta1, config.train.beta2)
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=betas, eps=config.train.eps, weight_decay=0.0)
    for _ in range(3):
        logits = model(input_ids=batch.input_ids).logits
        value = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        losses.append(float(value))
        optimizer.zero_grad()
        (value / 10).backward()
        optimizer.step()
    weights = {name: item.detach() for name, item in model.named_parameters() if item.requires_grad}
    return losses, {without_wrappers(name): item for name, item in weights.items()}


def _same_training(_: int, config: Config, losses: list[float], weights: dict[str, torch.Tensor]) -> None:
    backend = backends.import_backend(config)
    with process_group(config) as world:
        engine = backend.wrap(build.build_on_meta(config), config, world)
        for expected in losses:
            value = loss.summed_cross_entropy(engine.module, whole(rows(LENGTHS)))
            assert float(value) == pytest.approx(expected, rel=1e-5)
            backend.backward(engine, value / 10, last=True)
            backend.step(engine, RATE)
        found = {without_wrappers(name): weight for name, weight in backend.weights(engine)}
        assert set(found) == set(weights)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "zero3"])
@pytest.mark.parametrize(
    "settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["", "embedding and head"]
)
def test_steps_are_those_of_peft(
    base: Path, compose: Compose, layout: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    source = adapter(base, tmp_path / "adapter", **settings)
    config = put(going_on(base, compose, source, f"parallel={layout}", "train.micro_batch=2"), STEADY)
    losses, weights = trained_by_peft(base, source, config)
    assert losses[2] < losses[0]
    spawn(_same_training, 2, config, losses, weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    "base", [True, pytest.param(False, marks=pytest.mark.proof)], indirect=True, ids=["tied", "untied"]
)
def test_the_merged_model_is_that_of_peft(base: Path, tmp_path: Path) -> None:
    source = adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    run = tmp_path / "run"
    words = [f"run_dir={run}", "model=hub", f"model.source={base}", *curves.SMALL, *SMALL, f"adapter.source={source}"]
    shown = ranks.run(*words, "train.steps=2", "train.warmup_steps=0", "jobs=[preprocess,train]")
    assert f"r 4, going on from {source}" in shown
    config = resolve.load(run / "config.yaml")
    consolidate.run(put(config, {"consolidate.adapter_only": True}))
    (run / "model").rename(run / "adapter")
    consolidate.run(put(config, {"consolidate.adapter_only": False}))
    merged = of_peft(base, run / "adapter").merge_and_unload()
    found = load_file(run / "model/model.safetensors")
    expected = {name: weight for name, weight in merged.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].float(), weight, rtol=1e-4, atol=1e-5, msg=name)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, run / "adapter"))
    assert before.keys() == after.keys()
    assert all(0 < (after[name] - before[name]).abs().max() < 0.1 for name in before)
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert not torch.equal(loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight)
    assert not loaded.config.tie_word_embeddings


def test_weights_that_do_not_fit_are_named(base: Path, compose: Compose, tmp_path: Path) -> None:
    source = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = put(going_on(base, compose, source), {"adapter.targets": ["q_proj", "k_proj"], "adapter.r": 2})
    with pytest.raises(ConfigError) as caught:
        build.build(config)
    text = str(caught.value)
    assert f"adapter.source={source}: model.layers.0.self_attn.k_proj.lora_A.default.weight is in none of" in text
    assert (
        "model.layers.0.self_attn.q_proj.lora_A.default.weight in " in text
        and "has the shape [4, 128], not [2, 128]" in text
    )
