"""The trial of packed rows: it passes families that keep samples apart, tells others the borders, and refuses the rest."""

import re

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.models.llama.modeling_llama import LlamaModel

from conf.errors import ConfigError
from jobs import preflight
from jobs.data import batches
from jobs.model import shrink
from jobs.training import loss, packing_probe, sample_borders
from launcher.check import packing_rules
from launcher.check.model_files import ModelFiles
from launcher.check.packing_rules import LEAKING
from tests.conftest import Compose
from tests.jobs.families import FAMILIES
from tests.jobs.networks import network, rows
from tests.jobs.ranks import spawn

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


def empty(kind: str, attention: str | None = None, **values):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), attn_implementation=attention)


def borders(family: str, attention: str | None = None) -> str:
    kind, values = FAMILIES.get(family, (family, {}))
    return packing_probe.choose_borders(empty(kind, attention, **values), CPU)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", "gemma3_text", "gpt2", "deepseek_v3", "llama4_text", "phimoe"]
)
def test_families_that_read_positions_are_packed(family) -> None:
    if family == "llama4_text" and not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        with pytest.raises(ConfigError, match="llama4_text does not keep the samples of a row apart"):
            borders(family)  # before, transformers cut the chunks of attention across samples, as in 5.17
        return
    assert borders(family) == "positions"


@pytest.mark.parametrize(
    ("family", "attention"), [("gpt_oss", "eager"), ("falcon", "sdpa"), ("mpt", "eager"), ("nemotron", "muster_varlen")]
)
def test_families_that_ignore_positions_get_a_mask(family, attention) -> None:
    assert borders(family, attention) == "mask"


SOME = ("llama", "lfm2", "granitemoehybrid", "falcon", "falcon_alibi", "bloom", "qwen3_next", "mamba2", "minimax")
OTHERS = (*FAMILIES, *(kind for kind in LEAKING if kind not in FAMILIES))


@pytest.mark.parametrize(
    "family", [*SOME, *(pytest.param(name, marks=pytest.mark.proof) for name in OTHERS if name not in SOME)]
)
def test_the_launcher_refuses_what_mixes_samples(family: str, compose: Compose) -> None:
    """The launcher has a table; here a tiny model is tried. Families of the table that families.json lacks have default sizes."""
    kind, values = FAMILIES.get(family, (family, {}))
    config = AutoConfig.for_model(kind, **values).get_text_config()
    name, files = config.model_type, ModelFiles(True, (), config.to_dict())
    refused = list(packing_rules.problems(compose("data.packing=true"), files, frozenset()))
    if not refused:
        assert borders(family) == ("mask" if name in packing_rules.NEEDS_MASK else "positions")
        return
    message = f"data.packing=true: ({name} does not keep the samples of a row apart: .* is off by .*|a tiny .* cannot be tried .*)"
    with pytest.raises(ConfigError, match=f"{message} Set data.packing=false to train {name}$"):
        borders(family)


@pytest.mark.parametrize(
    ("family", "attention", "way"),
    [
        ("llama", "muster_varlen", "positions"),
        ("gpt_oss", "muster_varlen", "positions"),
        ("gpt_oss", "eager", "mask"),
        ("falcon", "sdpa", "mask"),
    ],
)
def test_the_chosen_way_gives_the_gradients_of_the_samples_alone(family, attention, way) -> None:
    kind, values = FAMILIES[family]
    model = network(kind, attention, **values)
    model.muster_borders = way
    lengths = [30, 11, 17]
    packed, alone = rows(lengths, 64, trained=0.8), rows(lengths, trained=0.8)
    loss.summed_cross_entropy(model, batches.collate(packed, np.zeros(1, int), pad=0)).backward()
    actual = gradients_or_zero(model)
    for number in range(3):
        sample = batches.collate(alone, alone.packs.row(number), pad=0, multiple=1)
        loss.summed_cross_entropy(model, sample).backward()
    expected = gradients_or_zero(model)
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-4 * value.norm() + 1e-5 * whole, name


def gradients_or_zero(model) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in model.named_parameters()}
    model.zero_grad()
    return found


def test_a_model_that_cannot_be_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_probe, "MAX_WEIGHTS", 10)
    with pytest.raises(ConfigError, match=r"a tiny LlamaForCausalLM cannot be tried \(.* weights\)"):
        borders("llama")


def test_the_trial_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    borders("llama")
    assert torch.equal(torch.rand(2), expected)


def test_sinks_in_packed_rows_need_no_mask() -> None:
    assert borders("gpt_oss", "muster_varlen") == "positions"


def test_the_trial_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention is compiled for each length: a trial of a few tokens took minutes on a GPU."""

    def refused(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(LlamaModel, "forward", torch.compile(LlamaModel.forward, backend=refused))
    assert borders("llama") == "positions"


def test_context_parallel_ranks_use_positions_only() -> None:
    kind, values = FAMILIES["gpt_oss"]
    with pytest.raises(ConfigError, match="gpt_oss does not keep the samples of a row apart"):
        packing_probe.choose_borders(empty(kind, "eager", **values), CPU, (sample_borders.DEFAULT,))


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "qwen3_moe",
        "gemma3_text",
        "gpt_oss",
        "falcon",
        "deepseek_v3",
        "llama4_text",
        "glm4_moe",
        "gemma3n_text",
    ],
)
def test_real_sizes_become_tiny(kind) -> None:
    original = AutoConfig.for_model(kind)
    small = next(shrink.configs(original))
    assert type(small) is type(original)
    weights = sum(item.numel() for item in empty(kind, "eager", **small_values(small)).parameters())
    assert weights < 100_000_000
    assert small.num_attention_heads <= 8
    assert small.vocab_size == shrink.VOCABULARY
    kinds = getattr(original, "layer_types", None) or []
    assert set(getattr(small, "layer_types", None) or []) == set(kinds)


def small_values(config) -> dict:
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}


def test_preflight_refuses_packed_rows_too(compose: Compose, tmp_path) -> None:
    from tests.jobs import families

    families.make(tmp_path / "source", "lfm2")
    words = ["model=hub", f"model.source={tmp_path}/source", f"run_dir={tmp_path}/run", "cluster.train.gpus_per_node=0"]
    (tmp_path / "run").mkdir()
    with pytest.raises(
        ProcessRaisedException, match=r"ConfigError: data\.packing=true: lfm2 .* Set data\.packing=false"
    ):
        spawn(_preflight, 1, compose(*words, "data.packing=true"))
    spawn(_preflight, 1, compose(*words))


def _preflight(_rank: int, config) -> None:
    preflight.run(config)


def test_a_run_with_packed_rows_is_refused_before_weights_are_read(compose: Compose, tmp_path) -> None:
    """The message names the key to change, and the model trains with it."""
    from tests.jobs import families

    cells = families.check(["lfm2"], ["packed", "full"], tmp_path, compose)
    assert [cell.verdict for cell in cells] == ["refused", "right"]
    assert re.search(r"data\.packing=true: lfm2 .* Set data\.packing=false", cells[0].detail)
