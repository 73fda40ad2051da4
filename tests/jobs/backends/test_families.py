"""Families whose configs, blocks or weights differ from Llama's: each trains, and equals plain transformers."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM

from conf.errors import ConfigError, DataError
from conf.schema import Config
from jobs.backends import fsdp
from jobs.data.packing import hidden_factor
from jobs.distributed.log_once import log_once
from jobs.distributed.process_group import process_group
from jobs.model import attention, block_sizes, build, fused_cross_entropy
from jobs.model.expert_modules import expert_modules
from jobs.model.quantized_linear import quantized_layers
from jobs.monitoring import flops
from jobs.tensor_io.wrapper_names import without_wrappers
from jobs.tokenization.tokenizer import load_tokenizer
from tests.conftest import Compose
from tests.jobs import families, families_page
from tests.jobs.ranks import spawn

pytestmark = pytest.mark.filterwarnings("ignore")
ODD = [
    "gemma4_text",
    "gemma3n_text",
    "mamba",
    "mamba2",
    "opt",
    "zamba2",
    "gpt2",
    "ernie4_5_moe",
    "llama4_text",
    "nemotron_h",
]


def on(source: Path, compose: Compose, *words: str) -> Config:
    return compose("model=hub", f"model.source={source}", *families.COMMON, *words)


def config_of(family: str):
    kind, values = families.FAMILIES[family]
    return AutoConfig.for_model(kind, **values)


@pytest.mark.parametrize("family", ODD)
def test_sizes_of_any_config_can_be_read(family, compose: Compose) -> None:
    config = config_of(family)
    name = attention.select(compose("model=hub", "model.source=x"), config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    assert hidden_factor(block_sizes.of(model.config)) > 0
    assert flops.count_weights(model, frozen=False).weights > 0
    fused_cross_entropy.fuse(model)
    assert build.blocks(model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gemma", "falcon", "gpt2", "deepseek_v3"])
def test_the_order_of_rows_of_other_families_stays(family) -> None:
    config = config_of(family)
    assert hidden_factor(block_sizes.of(config)) == hidden_factor(config)


def test_attention_costs_almost_nothing_without_attention() -> None:
    assert hidden_factor(block_sizes.of(config_of("mamba2"))) > 50 * hidden_factor(config_of("llama"))


def test_sizes_per_layer_are_averaged() -> None:
    assert block_sizes.of(config_of("gemma3n_text")).intermediate_size == 96


def test_gpt2_keeps_the_bias_that_transformers_ignores_elsewhere(tmp_path, compose: Compose) -> None:
    families.make(tmp_path, "gpt2")
    built = build.build(on(tmp_path, compose)).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert expected["transformer.h.0.attn.c_attn.bias"].any()
    assert built.keys() == expected.keys()
    assert all(torch.equal(built[name], value) for name, value in expected.items())


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "mpt"])
def test_rows_longer_than_fixed_positions_are_refused(family, tmp_path, compose: Compose) -> None:
    families.make(tmp_path, family)
    with pytest.raises(
        ConfigError,
        match=r"data\.max_length=600: the model has 512 positions, and none beyond them: set data\.max_length=512$",
    ):
        build.build_on_meta(on(tmp_path, compose, "data.max_length=600"))
    build.build_on_meta(on(tmp_path, compose, "data.max_length=512"))


def test_rows_longer_than_computed_positions_are_said(
    tmp_path, compose: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    families.make(tmp_path, "llama")
    log_once.cache_clear()
    build.build_on_meta(on(tmp_path, compose, "data.max_length=512"))
    assert "positions" not in capsys.readouterr().out
    build.build_on_meta(on(tmp_path, compose, "data.max_length=600"))
    assert "data.max_length=600 is more than 512, for which the model was made" in capsys.readouterr().out


def test_python_code_of_a_model_is_not_run_unless_trusted(tmp_path, compose: Compose) -> None:
    families.make(tmp_path, "llama")
    for name, part in (("config", "AutoConfig"), ("tokenizer_config", "AutoTokenizer")):
        path = tmp_path / f"{name}.json"
        code = {part: "own.Class" if name == "config" else ["own.Class", None]}
        changed = {"auto_map": code, "model_type": "new", "tokenizer_class": "New"}
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')\n")
    said = "comes with Python code of its own. Read that code, then add model.trust_remote_code=true$"
    with pytest.raises(ConfigError, match=f"^model.source=.*: {said}"):
        build.build_on_meta(on(tmp_path, compose))
    with pytest.raises(DataError, match=f"^model.tokenizer=.*: {said}"):
        load_tokenizer(on(tmp_path, compose))


def test_a_router_gets_no_adapter(tmp_path, compose: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    families.make(tmp_path, "phimoe")
    log_once.cache_clear()
    model = build.build_on_meta(on(tmp_path, compose, "adapter=lora"))
    names = [without_wrappers(name) for name, item in model.named_parameters() if item.requires_grad]
    assert names
    assert not [name for name in names if "router" in name]
    assert "adapter: no adapter on mlp.router, which cannot have one" in capsys.readouterr().out
    message = r"adapter\.targets=router: .*mlp\.router is a router, .* remove it from adapter\.targets"
    with pytest.raises(ConfigError, match=message):
        build.build_on_meta(on(tmp_path, compose, "adapter=lora", "adapter.targets=[router,q_proj]"))
    build.build_on_meta(on(tmp_path, compose, "adapter=lora", "adapter.targets=[q_proj]"))


def test_a_linear_layer_with_its_own_forward_gets_an_adapter(tmp_path, compose: Compose) -> None:
    """Falcon's layers have one."""
    families.make(tmp_path, "falcon")
    model = build.build_on_meta(on(tmp_path, compose, "adapter=lora"))
    adapted = {
        without_wrappers(name).split(".lora_")[0].rpartition(".")[2]
        for name, item in model.named_parameters()
        if item.requires_grad
    }
    assert adapted == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


@pytest.mark.parametrize(
    ("family", "target", "reason"),
    [
        ("mamba", "dt_proj", "has a weight that the model reads without calling the layer"),
        ("mamba", "mixer.out_proj", "has a weight that the model reads without calling the layer"),
        ("zamba2", "o_proj", "shares its weight with a layer of another block"),
    ],
)
def test_a_layer_whose_adapter_would_be_lost_gets_none(
    tmp_path, compose: Compose, family: str, target: str, reason: str
) -> None:
    families.make(tmp_path, family)
    for kind in ("lora", "qlora"):
        model = build.build_on_meta(on(tmp_path, compose, f"adapter={kind}"))
        adapted = [without_wrappers(name) for name, item in model.named_parameters() if item.requires_grad]
        assert adapted
        assert not [name for name in adapted if f".{target}." in name]
        packed = [name for name in quantized_layers(model) if f".{target}." in name]
        assert not packed
        with pytest.raises(
            ConfigError, match=rf"^adapter\.targets={target}: .*{target} {reason}, so it cannot have an"
        ):
            build.build_on_meta(on(tmp_path, compose, f"adapter={kind}", f"adapter.targets=[in_proj,{target}]"))


def test_a_shared_layer_may_have_an_adapter_that_is_never_merged(tmp_path, compose: Compose) -> None:
    families.make(tmp_path, "zamba2")
    words = ("adapter=lora", "adapter.targets=[o_proj]", "consolidate.adapter_only=true")
    assert [item for item in build.build_on_meta(on(tmp_path, compose, *words)).parameters() if item.requires_grad]


def test_layers_inside_mambas_kernel_get_no_adapter(tmp_path, compose: Compose) -> None:
    families.make(tmp_path, "nemotron_h")
    model = build.build_on_meta(on(tmp_path, compose, "adapter=lora"))
    layers = {
        without_wrappers(name).split(".lora_")[0].rpartition(".")[2]
        for name, item in model.named_parameters()
        if item.requires_grad
    }
    assert "in_proj" in layers
    assert not layers & {"out_proj", "conv1d"}


def _save(_rank: int, configs: list[Config]) -> None:
    with process_group(configs[0]) as world:
        for config in configs:
            engine = fsdp.wrap(build.build_on_meta(config), config, world)
            fsdp.save(engine, Path(config.run_dir))


@pytest.mark.slow
def test_weights_that_a_model_freezes_itself_are_saved(tmp_path, compose: Compose) -> None:
    """A merge needs them. Of an adapter's model, only the adapter is saved."""
    families.make(tmp_path / "source", "ernie4_5_moe")
    configs = [on(tmp_path / "source", compose, *words, "parallel=fsdp") for words in ([], ["adapter=lora"])]
    for number, config in enumerate(configs):
        config.run_dir = str(tmp_path / str(number))
    spawn(_save, 2, configs)
    saved = [
        {
            key.removeprefix("model.")
            for key in FileSystemReader(config.run_dir).read_metadata().state_dict_metadata
            if key.startswith("model.")
        }
        for config in configs
    ]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict().keys()
    frozen = [name for name, item in build.build_on_meta(configs[0]).named_parameters() if not item.requires_grad]
    assert frozen
    assert set(frozen) <= expected
    assert saved[0] == expected
    assert [name for name in saved[1] if "lora_" not in name] == []


@pytest.mark.slow
def test_odd_families_equal_transformers(compose: Compose, tmp_path) -> None:
    names = [*ODD, "gemma3", "qwen2_5_vl"]
    cells = families.check(names, ["full"], tmp_path, compose)
    assert [cell.verdict for cell in cells] == ["right"] * len(names), cells


@pytest.mark.slow
def test_ranks_may_call_other_experts_under_zero_3(compose: Compose, tmp_path) -> None:
    """DBRX calls a module for each expert that has a token. With weights gathered at each call, the ranks waited for each other."""
    cells = families.check(["dbrx"], ["zero3", "zero3LoRA"], tmp_path, compose)
    assert [cell.verdict for cell in cells] == ["right", "right"], cells


def test_modules_that_are_called_for_each_expert_are_found(tmp_path, compose: Compose) -> None:
    found = {}
    for family in ("dbrx", "qwen3_moe"):
        families.make(tmp_path / family, family)
        model = build.build_on_meta(on(tmp_path / family, compose, "adapter=lora"))
        found[family] = {type(module).__name__ for module in expert_modules(model)}
    assert found == {"dbrx": {"DbrxExperts"}, "qwen3_moe": set()}

    class OldBlock(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])

    block = OldBlock()
    assert expert_modules(torch.nn.Sequential(block)) == [block]


@pytest.mark.slow
def test_a_tokenizer_without_padding_and_end_tokens_trains(
    compose: Compose, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = families.make

    def make(folder: Path, family: str) -> None:
        original(folder, family)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(
            json.dumps({key: value for key, value in settings.items() if key not in ("pad_token", "eos_token")})
        )

    monkeypatch.setattr(families, "make", make)
    (cell,) = families.check(["llama"], ["full"], tmp_path, compose)
    assert cell.verdict == "right", cell


def test_the_table_counts_every_verdict() -> None:
    cells = [
        families_page.Cell("llama", "full", "right", "1.0e-07"),
        families_page.Cell("llama", "packed", "refused", "data.packing=true: no"),
        families_page.Cell("qwen2", "full", "wrong", "3.0e-01"),
        families_page.Cell("qwen2", "packed", "traceback", "KeyError: 'a'"),
    ]
    assert families_page.result(cells) == "RESULT families=2 right=1 refused=1 late=0 wrong=1 tracebacks=1"
    text = families_page.page(cells)
    assert "| llama | 1.0e-07 | **refused** |" in text
    assert "- llama, packed: data.packing=true: no" in text
    assert families_page.read_page(text) == cells


def test_new_cells_replace_those_of_the_page() -> None:
    old = families_page.read_page((families.ROOT / "docs/models.md").read_text())
    assert [*dict.fromkeys(cell.family for cell in old)] == list(families.FAMILIES)
    new = families_page.Cell("bitnet", "full", "right", "9.9e-09")
    after = families_page.merged(old, [new], families.FAMILIES)
    assert len(after) == len(old)
    assert [cell for cell in after if cell not in old] == [new]
