"""Start-up: every layout begins with exactly the stored weights, or the same random ones; no rank ever holds the whole model."""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from conf.errors import ConfigError
from conf.schema import Config
from jobs import backends
from jobs.backends import zero
from jobs.distributed.process_group import World, process_group
from jobs.model import build as model
from jobs.model import materialize, pretrained, stored_tensors
from jobs.tensor_io import model_files, slices
from jobs.tensor_io.wrapper_names import without_wrappers
from jobs.training import optimizer
from tests.conftest import Compose
from tests.jobs import families
from tests.jobs.ranks import spawn

LAYOUTS = {
    "fsdp": [], "fsdp_offload": [], "hsdp": ["parallel.shard_ranks=2"], "ddp": [],
    "zero1": [], "zero2": [], "zero3": [],
}  # fmt: skip
COMMON = ["train.global_batch=12", "cluster.train.gpus_per_node=0", "cluster.train.ranks_per_node=4"]
HUB = ["model=hub", f"model.tokenizer={Path(__file__).parents[3] / 'examples/tokenizer'}"]
LORA = ["adapter=lora", "adapter.r=4", "train.precision=bf16"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def stored(request, tmp_path_factory):
    """A tiny model in several files; no dimension divides by 3 or 4, and key and value heads are shared."""
    shape = LlamaConfig(
        vocab_size=1027, hidden_size=56, intermediate_size=101, num_hidden_layers=3, num_attention_heads=4, head_dim=14,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=request.param, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    )  # fmt: skip
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("stored")
    LlamaForCausalLM(shape).save_pretrained(folder, max_shard_size="90KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def _wrapped(config: Config, world: World) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Weights by plain name, gathered; buffers; the bytes that this rank read."""
    engine = backends.import_backend(config).wrap(model.build_on_meta(config), config, world)
    network = engine.module if config.parallel.backend.name == "fsdp" else engine.module.module
    return (
        {without_wrappers(name): value for name, value in _gathered(network)},
        dict(network.named_buffers()),
        engine.read_bytes,
    )


def _gathered(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in network.named_parameters():
        if isinstance(parameter, DTensor):
            yield name, parameter.full_tensor().detach()
        elif hasattr(parameter, "ds_id"):
            parameter.all_gather()
            yield name, parameter.detach().clone()
            parameter.partition()
        else:
            yield name, parameter.detach().clone()


def _equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], layout: str) -> None:
    assert actual.keys() == expected.keys(), layout
    for name, value in expected.items():
        assert torch.equal(actual[name], value.to(actual[name].dtype)), f"{layout}: {name}"


def _as_stored(_rank: int, configs: dict[str, Config]) -> None:
    with process_group(next(iter(configs.values()))) as world:
        whole = AutoModelForCausalLM.from_pretrained(next(iter(configs.values())).model.source, dtype=torch.float32)
        expected = dict(whole.named_parameters())
        size = sum(parameter.nbytes for parameter in expected.values())
        for layout, config in configs.items():
            actual, buffers, read = _wrapped(config, world)
            _equal(actual, expected, layout)
            for name, value in whole.named_buffers():
                assert buffers[name].dtype is torch.float32, layout
                assert torch.equal(buffers[name], value), layout
            if layout in ("fsdp", "fsdp_offload", "zero3"):
                assert read == pytest.approx(size / world.size, rel=0.06), layout
            elif layout == "hsdp":
                assert read == pytest.approx(size / 2, rel=0.06), layout
            else:
                assert read == size, layout


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, *(pytest.param(size, marks=pytest.mark.proof) for size in (1, 3, 4))])
def test_every_layout_starts_with_the_stored_weights(stored, compose: Compose, world) -> None:
    configs = {
        name: compose(*HUB, f"model.source={stored}", *COMMON, f"parallel={name}", *overrides)
        for name, overrides in LAYOUTS.items()
        if name != "hsdp" or world % 2 == 0
    }
    spawn(_as_stored, world, configs)


def _like_the_whole(_rank: int, configs: dict[str, Config]) -> None:
    """Every layout has the weights of `build` in one process, from which the reference curves start."""
    with process_group(next(iter(configs.values()))) as world:
        for layout, config in configs.items():
            expected = {
                without_wrappers(name): value.detach() for name, value in model.build(config).named_parameters()
            }
            _equal(_wrapped(config, world)[0], expected, layout)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.proof)])
def test_random_weights_are_equal_in_every_layout(compose: Compose, world) -> None:
    configs = {name: compose(*COMMON, f"parallel={name}") for name in LAYOUTS if name != "hsdp"}
    spawn(_like_the_whole, world, configs)


@pytest.mark.slow
def test_adapters_are_equal_in_every_layout_on_a_frozen_base_in_bf16(stored, compose: Compose) -> None:
    names = ["fsdp", "ddp", "zero2", "zero3"]
    overrides = [*HUB, f"model.source={stored}", *COMMON, *LORA]
    spawn(_like_the_whole, 3, {name: compose(*overrides, f"parallel={name}") for name in names})
    spawn(_like_the_whole, 2, {name: compose(*COMMON, *LORA, f"parallel={name}") for name in names})  # a random base


def test_the_whole_model_is_the_stored_one(stored, compose: Compose) -> None:
    built = model.build(compose(*HUB, f"model.source={stored}"))
    expected = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    _equal(built.state_dict(), expected.state_dict(), "whole")
    for name, value in expected.named_buffers():
        assert torch.equal(dict(built.named_buffers())[name], value)
    tied = expected.config.tie_word_embeddings
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied


def test_adapters_begin_as_the_identity_on_a_bf16_base(stored, compose: Compose) -> None:
    built = model.build(compose(*HUB, f"model.source={stored}", *LORA))
    for name, parameter in built.named_parameters():
        assert parameter.dtype is (torch.float32 if parameter.requires_grad else torch.bfloat16), name
        assert (parameter == 0).all() == ("lora_B" in name), name


def test_random_weights_have_the_scale_of_the_model(compose: Compose) -> None:
    built = model.build(compose())
    assert built.model.embed_tokens.weight.std().item() == pytest.approx(built.config.initializer_range, rel=0.05)
    assert (built.model.norm.weight == 1).all()
    first, second = (layer.mlp.up_proj.weight for layer in built.model.layers[:2])
    assert not torch.equal(first, second)
    assert torch.equal(model.build(compose()).lm_head.weight, built.lm_head.weight)
    assert not torch.equal(model.build(compose("train.seed=1")).lm_head.weight, built.lm_head.weight)


def _refused(_rank: int, config: Config, expected_words: list[str]) -> None:
    with process_group(config) as world, pytest.raises(ConfigError) as caught:
        backends.import_backend(config).wrap(model.build_on_meta(config), config, world)
    for word in expected_words:
        assert word in str(caught.value)


def _damaged(stored, folder, change):
    """A copy of the stored model, with `change` applied to the file that contains the first block's up projection."""
    folder.mkdir()
    for path in stored.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = "model.layers.0.mlp.up_proj.weight"
    path = folder / json.loads((stored / "model.safetensors.index.json").read_text())["weight_map"][name]
    change(path, load_file(path), name)
    return folder


def _shorter(path, tensors, name) -> None:
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, path)


def _absent(path, tensors, name) -> None:
    save_file({"model.layers.0.mlp.other.weight": tensors.pop(name), **tensors}, path)


def _cut(path, _tensors, _name) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _gone(path, _tensors, _name) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("change", "expected_words"),
    [
        (_shorter, ["model.layers.0.mlp.up_proj.weight", "[100, 56], not [101, 56]", ".safetensors"]),
        (
            _absent,
            ["model.layers.0.mlp.up_proj.weight is in none", "model.layers.0.mlp.other.weight", "is not in the model"],
        ),
        (_cut, ["is cut off"]),
        (_gone, ["No such file"]),
    ],
)
def test_files_that_do_not_match_are_refused_on_every_rank(
    stored, compose: Compose, tmp_path: Path, change, expected_words
) -> None:
    folder = _damaged(stored, tmp_path / "damaged", change)
    config = compose(*HUB, f"model.source={folder}", *COMMON, "parallel=fsdp")
    spawn(_refused, 2, config, ["model.source", *expected_words])


def llama(*, vocabulary, hidden, inner, layers, heads):
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return LlamaForCausalLM(shape)


def test_tied_weights_that_differ_in_the_files_are_refused(compose: Compose, tmp_path: Path) -> None:
    llama(vocabulary=1024, hidden=16, inner=16, layers=1, heads=2).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match=r"lm_head\.weight.*tie_word_embeddings"):
        model.build(compose(*HUB, f"model.source={tmp_path}"))


def _binary(folder) -> None:
    """The same weights as one pickle, which cannot be read in slices."""
    tensors = {}
    for path in folder.glob("*.safetensors*"):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def test_weights_that_cannot_be_sliced_are_read_whole(stored, compose: Compose, tmp_path: Path) -> None:
    folder = _damaged(stored, tmp_path / "bin", lambda path, _tensors, _name: _binary(path.parent))
    configs = {name: compose(*HUB, f"model.source={folder}", *COMMON, f"parallel={name}") for name in ("fsdp", "zero3")}
    spawn(_whole, 2, configs, str(stored))


def _whole(_rank: int, configs: dict[str, Config], source: str) -> None:
    with process_group(configs["fsdp"]) as world:
        expected = dict(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).named_parameters())
        for layout, config in configs.items():
            actual, _, read = _wrapped(config, world)
            _equal(actual, expected, layout)
            assert read == 0


def _resident() -> int:
    """Bytes of this process's anonymous memory: without pages of mapped files, which the kernel may drop."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def _measured(_rank: int, config: Config, size: int) -> None:
    """The peak of memory that filling adds: this rank's half of the model and read buffers, never the whole model."""
    with process_group(config) as world:
        if config.parallel.backend.name == "zero":
            zero.init_deepspeed(world)
        meta_model = model.build_on_meta(config)
        before, peak, done = _resident(), [0], Event()

        def watch() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], _resident())

        watcher = Thread(target=watch, daemon=True)  # if filling fails, the rank ends all the same
        watcher.start()
        if (
            config.parallel.backend.name == "zero"
        ):  # what DeepSpeed itself makes afterwards lives on the GPU, if there is one
            materialize.fill(
                meta_model, model.build_on_meta, zero._allocate_partitions(meta_model, config, world), config, world
            )
        else:
            backends.import_backend(config).wrap(meta_model, config, world)
        done.set()
        watcher.join()
        assert size / 2 <= peak[0] - before < 0.75 * size, f"{(peak[0] - before) / size:.2f} of the model"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "zero3"])
def test_no_rank_ever_holds_the_whole_model(layout, compose: Compose, tmp_path: Path) -> None:
    whole = llama(vocabulary=16384, hidden=1024, inner=4096, layers=3, heads=8)
    size = sum(parameter.nbytes for parameter in whole.parameters())
    assert size > 300e6
    whole.save_pretrained(tmp_path, max_shard_size="100MB")
    del whole
    spawn(_measured, 2, compose(*HUB, f"model.source={tmp_path}", *COMMON, f"parallel={layout}"), size)


def test_a_resumed_run_reads_no_weights_that_its_checkpoint_holds(stored, compose: Compose) -> None:
    overrides = [*HUB, f"model.source={stored}", *COMMON]
    spawn(_skipped, 2, [compose(*overrides, "parallel=fsdp"), compose(*overrides, "parallel=fsdp", *LORA)])


def _skipped(_rank: int, configs: list[Config]) -> None:
    with process_group(configs[0]) as world:
        full, lora = (
            backends.import_backend(config).wrap(model.build_on_meta(config), config, world, resumed=True)
            for config in configs
        )
    assert full.read_bytes == 0
    assert lora.read_bytes > 0
    for engine in (full, lora):
        for (
            name,
            parameter,
        ) in (
            engine.module.named_parameters()
        ):  # NaN until the checkpoint is loaded, so that a missing weight is noticed
            assert parameter.to_local().isnan().all() == parameter.requires_grad, name


def test_fused_experts_are_converted_by_transformers(compose: Compose, tmp_path: Path) -> None:
    shape = MixtralConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(shape).save_pretrained(tmp_path)
    assert any(
        "experts.0.w1" in name for name in load_file(tmp_path / "model.safetensors")
    )  # one by one, as on the Hub
    built = model.build(compose(*HUB, f"model.source={tmp_path}"))
    _equal(
        built.state_dict(), MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict(), "mixtral"
    )


def test_each_rank_reads_its_part_of_fused_experts(compose: Compose, tmp_path: Path) -> None:
    shape = MixtralConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=6,
    )  # fmt: skip
    MixtralForCausalLM(shape).save_pretrained(tmp_path, max_shard_size="90KB")
    configs = {
        name: compose(*HUB, f"model.source={tmp_path}", *COMMON, f"parallel={name}") for name in ("fsdp", "zero3")
    }
    spawn(_as_stored, 2, configs)


FAMILIES = ["qwen3_moe", "granitemoe", "deepseek_v3", "nemotron_h", "minimax_m2"]
MORE = [
    *(
        "qwen2_moe",
        "qwen3_next",
        "qwen3_5_moe_text",
        "phimoe",
        "olmoe",
        "olmo_hybrid",
        "granitemoehybrid",
        "deepseek_v2",
    ),
    *("glm4_moe", "jamba", "lfm2_moe", "gpt_neox", "ernie4_5_moe", "minimax", "kimi_linear", "dots1", "mimo_v2_flash"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.proof) for name in MORE)])
def test_renamed_and_fused_weights_are_those_of_transformers(family, compose: Compose, tmp_path: Path) -> None:
    """Each is read from the parts in the files, which transformers renames, fuses or splits."""
    families.make(tmp_path, family)
    config = compose("model=hub", f"model.source={tmp_path}", *families.COMMON)
    base = model.build_on_meta(config)
    stored = slices.find_tensors(tmp_path, "model.source", str(tmp_path))
    assert (
        stored_tensors.first_converted(base, stored) and not pretrained._choose_method(base, tmp_path, config).why_whole
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    _equal(model.build(config).state_dict(), expected.state_dict(), family)


@pytest.mark.filterwarnings("ignore")
def test_a_missing_expert_is_named(compose: Compose, tmp_path: Path) -> None:
    families.make(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"in none of the files, first model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight:"
    ):
        model.build(compose("model=hub", f"model.source={tmp_path}", *families.COMMON))


def test_a_model_of_the_hub_is_found_in_the_cache(stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name/snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "models--owner--name/refs").mkdir()
    (tmp_path / "models--owner--name/refs/main").write_text(commit)
    snapshot.symlink_to(stored)
    assert model_files.find_or_download("owner/name", None, cached=True) == snapshot
    assert model_files.find_or_download("owner/other", None, cached=True) is None
    assert len(slices.find_tensors(snapshot, "model.source", "owner/name")) >= 29


def test_weights_that_zero3_has_partitioned_still_decay(compose: Compose) -> None:
    matrix, vector = (nn.Parameter(torch.empty(0)) for _ in range(2))
    matrix.ds_shape, vector.ds_shape = torch.Size([2, 3]), torch.Size([2])
    model = nn.ParameterList([matrix, vector])
    groups = optimizer.build(model, compose("train.weight_decay=0.1")).param_groups
    assert [(group["weight_decay"], group["params"][0] is matrix) for group in groups] == [(0.1, True), (0.0, False)]
