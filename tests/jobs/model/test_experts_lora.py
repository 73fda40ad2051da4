"""LoRA on the fused matrices of experts: names, initial weights, training on two ranks, saving and resuming."""

from pathlib import Path

import pytest
import torch

from conf.choices import Backend
from conf.errors import ConfigError, RunError
from jobs.backends import fsdp, zero
from jobs.checkpoint import reshard
from jobs.consolidation import adapter_layers, lora, updates
from jobs.distributed.log_once import log_once
from jobs.distributed.process_group import process_group
from jobs.model import build, materialize, random_init
from jobs.tensor_io import wrapper_names
from jobs.tensor_io.wrapper_names import without_wrappers
from tests.conftest import Compose
from tests.jobs import families
from tests.jobs.ranks import spawn

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = ["adapter=lora", "adapter.r=4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    families.make(folder, "qwen3_moe")
    return folder


def on(source: Path, compose: Compose, *words: str):
    return compose("model=hub", f"model.source={source}", *families.COMMON, *LORA, *words)


def test_both_adapters_on_a_pair_of_matrices_have_their_own_names(source, compose: Compose) -> None:
    model = build.build_on_meta(on(source, compose))
    names = [name for name, _ in model.named_parameters()]
    plain = [without_wrappers(name) for name in names]
    assert len(set(plain)) == len(plain)
    inner, outer = (f"model.layers.0.mlp.experts.{part}lora_A.default.weight" for part in ("base_layer.", ""))
    assert {inner, outer, "model.layers.0.mlp.experts.gate_up_proj"} <= set(plain)
    assert {inner, outer} <= random_init.adapter_weights(model).keys()


def test_both_adapters_start_with_pefts_weights(source, compose: Compose) -> None:
    weights = dict(build.build(on(source, compose)).named_parameters())
    adapters = {name: value for name, value in weights.items() if "lora_" in name}
    assert len([name for name in adapters if ".mlp.experts." in name]) == 8
    for name, value in adapters.items():
        if "lora_B" in name:
            assert not value.any(), name
        else:  # uniform between the bounds of Kaiming's initialization for the width of the input
            bound = value.shape[1] ** -0.5
            assert 0.5 * bound < value.abs().max() <= bound, name


def test_two_weights_of_one_name_are_an_error(source, compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build.build_on_meta(on(source, compose))
    monkeypatch.setattr(materialize, "without_wrappers", lambda name: name.replace("base_layer.", ""))
    with pytest.raises(RunError, match=r"experts\.lora_A\.default\.weight: another weight is also called"):
        materialize.local_parts(model, lambda parameter: (parameter.shape, 0, torch.empty(parameter.shape)))
    assert wrapper_names.without_wrappers("a.base_layer.base_layer.weight") == "a.weight"


def test_a_weight_that_nothing_filled_is_named(source, compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config, original = on(source, compose), random_init._copy_to_parts
    left_out = "model.layers.1.mlp.experts.base_layer.lora_B.default.weight"
    monkeypatch.setattr(
        random_init,
        "_copy_to_parts",
        lambda weights, parts: original(((k, v) for k, v in weights if k != left_out), parts),
    )
    with pytest.raises(RunError, match=f"model={left_out}: was never filled"):
        materialize.require_filled(build.build(config), config, resumed=False)
    monkeypatch.undo()
    materialize.require_filled(build.build(config), config, resumed=False)


def test_a_weight_is_filled_exactly_once(source, compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_init, "init_adapters", lambda *_: [])
    with pytest.raises(RunError, match="was filled 0 times, not once"):
        build.build(on(source, compose))


def test_a_nan_in_the_files_is_blamed_on_the_files(tmp_path, compose: Compose) -> None:
    from safetensors.torch import load_file, save_file

    families.make(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, file, {"format": "pt"})
    config = compose("model=hub", f"model.source={tmp_path}", *families.COMMON)
    message = r"model\.layers\.1\.mlp\.up_proj\.weight has values that are not numbers \(NaN\) in model\.safetensors: download"
    with pytest.raises(ConfigError, match=message):
        materialize.require_filled(build.build(config), config, resumed=False)


def test_a_weight_missing_from_the_checkpoint_is_named(source, compose: Compose) -> None:
    config = on(source, compose)
    model = build.build(config)
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.default.weight"
    with torch.no_grad():
        dict(model.named_parameters())[name].fill_(torch.nan)
    with pytest.raises(
        RunError, match=r"checkpoint=model\.layers\.0\.mlp\.experts\.lora_A.*: is not in the checkpoint"
    ):
        materialize.require_filled(model, config, resumed=True)


def test_dropout_on_experts_is_refused_with_a_remedy_that_works(source, compose: Compose) -> None:
    with pytest.raises(
        ConfigError, match=r"adapter\.dropout=0\.1: experts cannot have dropout: set adapter\.dropout=0,"
    ):
        build.build_on_meta(on(source, compose, "adapter.dropout=0.1"))
    build.build_on_meta(on(source, compose, "adapter.dropout=0.1", "adapter.targets=[q_proj,v_proj]"))


def test_dora_on_experts_is_refused_with_a_remedy_that_works(source, compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.dora=true: DoRA cannot adapt experts: set adapter\.dora=false,"):
        build.build_on_meta(on(source, compose, "adapter.dora=true"))
    build.build_on_meta(on(source, compose, "adapter.dora=true", "adapter.targets=[q_proj,v_proj]"))


def test_experts_that_stay_frozen_are_named_and_can_be_targets(
    tmp_path, compose: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    families.make(tmp_path, "gpt_oss")
    log_once.cache_clear()
    build.build_on_meta(on(tmp_path, compose))
    said = capsys.readouterr().out
    assert (
        "adapter: adapter.targets=all-linear adapts 8 layers, none of the experts. No adapter on the experts in "
        in said
    )
    assert "mlp.experts.down_proj, mlp.experts.gate_up_proj; name them in adapter.targets" in said
    log_once.cache_clear()
    targets = "adapter.targets=[q_proj,mlp.experts.down_proj,mlp.experts.gate_up_proj]"
    model = build.build_on_meta(on(tmp_path, compose, targets))
    adapters = {without_wrappers(name) for name, item in model.named_parameters() if item.requires_grad}
    assert {name.split(".lora_")[0].split(".", 3)[3] for name in adapters} == {
        "self_attn.q_proj",
        "mlp.experts",
        "mlp.experts.base_layer",
    }
    assert "no adapter" not in capsys.readouterr().out


LEFT_OUT = {
    "dbrx": "adapts 6 layers, none of the experts. No adapter on the experts in experts.mlp.v1, experts.mlp.w1, experts.mlp.w2;",
    "granitemoe": "No adapter on the experts in block_sparse_moe.experts.down_proj, block_sparse_moe.experts.gate_up_proj;",
    "deepseek_v3": "all-linear leaves out 6 linear layers, mlp.down_proj, mlp.gate_proj, mlp.up_proj, shared_experts.down_proj, ",
    "jamba": "No adapter on the experts in feed_forward.experts.down_proj, feed_forward.experts.gate_up_proj;",
    "llama": "",
}


@pytest.mark.parametrize("family", LEFT_OUT)
def test_what_all_linear_leaves_out_is_said(family, tmp_path, compose: Compose, capsys) -> None:
    families.make(tmp_path, family)
    log_once.cache_clear()
    build.build_on_meta(on(tmp_path, compose, "adapter.dropout=0"))
    said = capsys.readouterr().out
    assert LEFT_OUT[family] in said if LEFT_OUT[family] else "all-linear" not in said
    if family == "deepseek_v3":  # what the message says
        build.build_on_meta(on(tmp_path, compose, "adapter.targets=[q_a_proj,gate_proj,up_proj,down_proj]"))
        assert "leaves out" not in capsys.readouterr().out


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_an_adapter_adds_is_what_peft_merges(family, compose: Compose, tmp_path) -> None:
    families.make(tmp_path, family)
    words = ["adapter.targets=[mlp.experts.down_proj,mlp.experts.gate_up_proj]"] if family == "gpt_oss" else []
    model = build.build(on(tmp_path, compose, *words))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_()
    weights = {without_wrappers(name): value.detach().clone() for name, value in model.named_parameters()}
    layers = adapter_layers.describe(model).layers
    assert {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")} <= {
        layer.weight for layer in layers.values()
    }
    merged = dict(model.merge_and_unload().named_parameters())
    for name, layer in layers.items():
        parts = {f"lora_{letter}": weights[f"{name}.lora_{letter}.default.weight"] for letter in "AB"}
        ours = weights[layer.weight].clone()
        update = updates._make_update(layer, parts)
        lora.add_product(ours.view(update.shape), update, 0)
        torch.testing.assert_close(merged[layer.weight], ours)


def _save_and_load(_rank: int, config, to_zero, folder: str) -> None:
    with process_group(config) as world:
        engine = fsdp.wrap(build.build_on_meta(config), config, world)
        for number, parameter in enumerate(item for item in engine.module.parameters() if item.requires_grad):
            parameter.to_local().detach().fill_(number + 1)
        fsdp.save(engine, Path(folder))
        expected = dict(fsdp.weights(engine))
        resumed = fsdp.wrap(build.build_on_meta(config), config, world, resumed=True)
        with pytest.raises(RunError, match=r"experts\.base_layer\.lora_A.*: is not in the checkpoint"):
            materialize.require_filled(resumed.module, config, resumed=True)
        fsdp.load(resumed, Path(folder))
        materialize.require_filled(resumed.module, config, resumed=True)
        check_equal(dict(fsdp.weights(resumed)), expected)
        other = zero.wrap(build.build_on_meta(to_zero), to_zero, world, resumed=True)
        reshard.load(zero, other, Path(folder), Backend.fsdp)
        check_equal(dict(zero.weights(other)), expected)


def check_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert len({value.flatten()[0].item() for value in expected.values()}) == len(expected)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_both_adapters_are_saved_and_loaded_also_by_another_layout(source, compose: Compose, tmp_path) -> None:
    configs = [on(source, compose, f"parallel={name}") for name in ("fsdp", "zero2")]
    spawn(_save_and_load, 2, *configs, str(tmp_path))


@pytest.mark.slow
def test_training_equals_peft_in_one_process(compose: Compose, tmp_path) -> None:
    cells = families.check(["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"], ["LoRA"], tmp_path, compose)
    assert [cell.verdict for cell in cells] == ["right"] * 4, cells
