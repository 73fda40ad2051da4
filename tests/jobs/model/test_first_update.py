"""`adapter.init`: adapters and base begin as PEFT's own, also on several ranks and after a resume; the merge equals PEFT's."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from conf.errors import ConfigError, RunError
from conf.schema import Config
from jobs import backends, consolidate, preprocess
from jobs.distributed.process_group import World, process_group
from jobs.model import build, first_update
from jobs.tensor_io.wrapper_names import without_wrappers
from jobs.tokenization.tokenizer import load_tokenizer
from launcher.check import combinations
from tests.conftest import Compose, put
from tests.jobs import curves
from tests.jobs.model.test_saved_modules import on
from tests.jobs.networks import rows, whole
from tests.jobs.ranks import spawn

pytestmark = pytest.mark.filterwarnings("ignore")
PATTERNS = ["+adapter.rank_pattern={down_proj: 3}", "adapter.r=4", "adapter.alpha=12"]


@pytest.fixture(scope="module")
def base(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = compose("model=tiny", "model.architecture.tie_word_embeddings=false")
    build.build(config).save_pretrained(folder)
    load_tokenizer(config).save_pretrained(folder)
    return folder


def of_peft(base: Path, init: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    settings = {"r": 4, "lora_alpha": 12, "rank_pattern": {"down_proj": 3}, "target_modules": "all-linear"}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=init, **settings))  # type: ignore[arg-type]
    return {without_wrappers(name): item.detach() for name, item in model.named_parameters()}


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_begins_as_that_of_peft(base: Path, compose: Compose, init: str, precision: str) -> None:
    config = on(base, compose, f"adapter.init={init}", *PATTERNS, f"train.precision={precision}")
    expected = of_peft(base, init, build.compute_dtype(config))
    found = {without_wrappers(name): item for name, item in build.build(config).named_parameters()}
    for name, item in found.items():
        rounded = item.to(build.compute_dtype(config)).to(item.dtype)  # as PEFT rounds its matrices
        torch.testing.assert_close(rounded, expected[name], msg=name)
    plain = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    name = "model.layers.0.mlp.down_proj.weight"
    assert (found[name].float() - plain[name]).abs().max() > 1e-3


def test_a_gaussian_begin_has_the_spread_of_peft(base: Path, compose: Compose) -> None:
    ours, theirs = build.build(on(base, compose, "adapter.init=gaussian", *PATTERNS)), of_peft(base, "gaussian")
    for name, item in ours.named_parameters():
        if "lora_A" in name:
            assert float(item.std()) == pytest.approx(float(theirs[without_wrappers(name)].std()), rel=0.3)
        if "lora_B" in name:
            assert not item.any()


def _begins_as(_: int, config: Config, expected: dict[str, torch.Tensor], resumed: bool) -> None:
    backend = backends.import_backend(config)
    with process_group(config) as world:
        engine = backend.wrap(build.build_on_meta(config), config, world, resumed)
        model = getattr(engine.module, "module", engine.module)
        for name, item in model.named_parameters():
            if not (resumed and "lora_" in name):
                found = _whole(item, world)
                torch.testing.assert_close(found, expected[without_wrappers(name)], msg=name)


def _whole(parameter: Any, world: World) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    local = parameter.ds_tensor.detach().contiguous()
    parts = [torch.empty_like(local) for _ in range(world.size)]
    torch.distributed.all_gather(parts, local)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "zero3", pytest.param("zero2", marks=pytest.mark.proof)])
def test_every_rank_begins_and_resumes_as_peft(base: Path, compose: Compose, tmp_path: Path, layout: str) -> None:
    config = on(base, compose, "adapter.init=pissa", *PATTERNS, f"parallel={layout}", f"run_dir={tmp_path}")
    torch.set_num_threads(1)  # as in the ranks: a decomposition by several threads rounds otherwise
    expected = of_peft(base, "pissa")
    spawn(_begins_as, 2, config, expected, False)
    assert (tmp_path / first_update.FILE).exists()
    spawn(_begins_as, 2, config, expected, True)


def test_a_lost_first_update_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / first_update.FILE
    for content in (None, b"no safetensors"):
        if content:
            path.write_bytes(content)
        with pytest.raises(RunError, match="it has what was taken off the base"):
            first_update.read(path, ["x"])


@pytest.mark.slow
def test_the_merge_is_the_live_model_of_peft(base: Path, compose: Compose, tmp_path: Path) -> None:
    """Trained for some steps; then merged, and as an adapter that PEFT loads on the base."""
    words = [
        *curves.SMALL,
        *PATTERNS,
        "adapter.init=pissa",
        "adapter.targets=[q_proj,down_proj]",
        f"run_dir={tmp_path}/run",
    ]
    config = on(base, compose, *words, "cluster.train.ranks_per_node=2")
    preprocess.run(config)
    curves.train_each([config], world=2)
    consolidate.run(config)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    tokens = whole(rows([9, 14, 11])).input_ids
    with torch.no_grad():
        ours = merged(tokens).logits
        (tmp_path / "run/model").rename(tmp_path / "merged")
        consolidate.run(put(config, {"consolidate.adapter_only": True}))
        plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = plain(tokens).logits
        live = PeftModel.from_pretrained(plain, tmp_path / "run/model").eval()
        torch.testing.assert_close(ours, live(tokens).logits, rtol=1e-4, atol=1e-4)  # PEFT decomposes the base again
    assert (ours - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=none"], "needs an adapter, but adapter.kind=none"),
        (["adapter=qlora"], "adapter.base=nf4 is rounded, so it cannot be taken off. Use adapter=lora"),
        (["adapter=dora"], "DoRA needs the whole base"),
        (["model=tiny"], "model.init=random has no stored base"),
    ],
)
def test_what_has_no_base_to_begin_with_is_refused(
    base: Path, compose: Compose, words: list[str], message: str
) -> None:
    found = list(combinations.problems(on(base, compose, "adapter.init=pissa", *words)))
    assert any(str(item).startswith("adapter.init=pissa: ") and message in str(item) for item in found), found


def test_files_without_single_weights_are_refused(base: Path, compose: Compose, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(base / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="needs one weight after another, but .* has no safetensors files"):
        build.build(on(folder, compose, "adapter.init=pissa", "adapter.targets=[q_proj]"))


def test_the_embedding_cannot_begin_like_this(base: Path, compose: Compose) -> None:
    config = on(base, compose, "adapter.init=pissa", "adapter.targets=[q_proj,embed_tokens]")
    with pytest.raises(ConfigError, match="embed_tokens is none: remove it from adapter.targets"):
        build.build(config)
