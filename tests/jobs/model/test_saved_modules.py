"""Layers that are trained whole beside the adapters: gradients are those of PEFT, and the merged model is the trained one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from conf.errors import ConfigError
from conf.schema import Config
from jobs import backends
from jobs.backends import zero
from jobs.distributed.process_group import process_group
from jobs.evaluation import load_model
from jobs.model import build
from jobs.tokenization.tokenizer import load_tokenizer
from jobs.training import loss
from launcher.estimate import parameters
from tests.conftest import Compose
from tests.jobs import curves, ranks
from tests.jobs.networks import rows, whole
from tests.jobs.ranks import spawn

BOTH = "adapter.modules_to_save=[embed_tokens,lm_head]"
SMALL = [
    "adapter=lora", "cluster.train.ranks_per_node=2", "cluster.train.gpus_per_node=0", "train.precision=fp32",
    "train.global_batch=4", "train.max_grad_norm=0",
]  # fmt: skip
LENGTHS = [9, 14, 11]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, with and without a head of its own."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = compose("model=tiny", f"model.architecture.tie_word_embeddings={str(request.param).lower()}")
    build.build(config).save_pretrained(folder)
    load_tokenizer(config).save_pretrained(folder)
    return folder


def on(base: Path, compose: Compose, *words: str) -> Config:
    return compose("model=hub", f"model.source={base}", *SMALL, *words)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    (loss.summed_cross_entropy(model, whole(rows(LENGTHS))) / 10).backward()
    return {name: item.grad for name, item in model.named_parameters() if item.requires_grad}


def of_peft(base: Path, config: Config) -> dict[str, torch.Tensor]:
    """Gradients of PEFT's own model on transformers', with the adapters of Muster's."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    saved = config.adapter.modules_to_save
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=saved, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    ours = dict(build.build(config).named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(ours)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(ours[name])
    logits = model(input_ids=whole(rows(LENGTHS)).input_ids).logits
    batch = whole(rows(LENGTHS))
    value = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    (value / 10).backward()
    return {name: item.grad for name, item in model.named_parameters() if item.requires_grad}


def _same_gradients(_: int, config: Config, expected: dict[str, torch.Tensor]) -> None:
    from deepspeed.utils import safe_get_full_grad

    backend = backends.import_backend(config)
    with process_group(config) as world:
        engine = backend.wrap(build.build_on_meta(config), config, world)
        value = loss.summed_cross_entropy(engine.module, whole(rows(LENGTHS))) / 10
        backend.backward(engine, value, last=True)
        model = engine.module.module if backend is zero else engine.module
        trained = {name: item for name, item in model.named_parameters() if item.requires_grad}
        assert set(trained) == set(expected)
        for name, item in trained.items():
            grad = item.grad.full_tensor() if isinstance(item, DTensor) else safe_get_full_grad(item)
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


LAYOUTS = [
    "fsdp",
    "zero3",
    pytest.param("zero2", marks=pytest.mark.proof),
    pytest.param("ddp", marks=pytest.mark.proof),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "saved", [BOTH, "adapter.modules_to_save=[embed_tokens,norm]"], ids=["both", "embedding and norms"]
)
def test_gradients_are_those_of_peft(base: Path, compose: Compose, layout: str, saved: str) -> None:
    config = on(base, compose, saved, f"parallel={layout}")
    expected = of_peft(base, config)
    assert any("modules_to_save" in name and item.any() for name, item in expected.items())
    counts = parameters.count(config.model.architecture, config.adapter)
    assert counts and counts.trained == sum(item.numel() for item in expected.values())
    spawn(_same_gradients, 2, config, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "base", [True, pytest.param(False, marks=pytest.mark.proof)], indirect=True, ids=["tied", "untied"]
)
@pytest.mark.parametrize("layout", ["zero3", pytest.param("fsdp", marks=pytest.mark.proof)])
@pytest.mark.parametrize(
    "tokens",
    [pytest.param([], marks=pytest.mark.proof), ['data.special_tokens=["<|a|>","<|b|>"]']],
    ids=["", "new tokens"],
)
def test_the_merged_model_is_the_trained_one(base: Path, layout: str, tokens: list[str], tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}/run", "model=hub", f"model.source={base}", *curves.SMALL, *SMALL, BOTH, *tokens]
    words += [f"parallel={layout}", "train.fingerprint=true", "train.steps=3", "train.warmup_steps=0"]
    shown = ranks.run(*words, "jobs=[preprocess,train,consolidate,evaluate]")
    assert "weights equal those in training" in shown and "of their spread from PEFT's" in shown
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    live = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert json.loads((tmp_path / "run/evaluate.json").read_text())["loss"] == pytest.approx(live[-1], abs=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert merged.get_input_embeddings().weight.shape[0] == 1024 + len(tokens) * 2
    assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter.modules_to_save=[wte]"], "adapter.modules_to_save=wte: no layer of the model has this name; some are"),
        (["adapter.modules_to_save=[mlp]"], "adapter.modules_to_save=mlp: model.layers.0.mlp has layers inside"),
        (["adapter.modules_to_save=[up_proj]", "adapter=qlora"], "up_proj is stored quantized, and cannot be trained"),
        (["adapter.modules_to_save=[embed_tokens]", 'data.special_tokens=["<|a|>"]'], f"Set {BOTH}"),
        (['data.special_tokens=["<|a|>"]'], f"Set {BOTH}"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_whole_is_refused(base: Path, compose: Compose, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build.build_on_meta(on(base, compose, *words))
    assert message in str(caught.value)


def test_an_adapter_with_new_tokens_is_loaded_on_a_base_without_them(
    base: Path, compose: Compose, tmp_path: Path
) -> None:
    config = on(base, compose, BOTH, 'data.special_tokens=["<|a|>","<|b|>"]')
    trained = build.build(config)
    trained.save_pretrained(tmp_path)
    loaded = load_model.load_folder(tmp_path, config, torch.float32)
    batch = whole(rows(LENGTHS))
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch.input_ids).logits, trained.eval()(batch.input_ids).logits)
    assert loaded(batch.input_ids).logits.shape[-1] == 1026


@pytest.mark.slow
def test_embedding_and_head_are_trained_on_a_quantized_base(base: Path, compose: Compose) -> None:
    model = build.build(on(base, compose, BOTH, "adapter=qlora", "train.precision=bf16"))
    copies = {name: item for name, item in model.named_parameters() if "modules_to_save" in name}
    assert len(copies) == 2 and all(item.dtype is torch.float32 and item.requires_grad for item in copies.values())
    assert all(gradients_of(model)[name].any() for name in copies)
