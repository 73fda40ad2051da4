"""By default a full fine-tune records its logits, and the merge compares them; of a large model, the first blocks are compared."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conf.choices import Float8, Verify
from conf.errors import RunError
from conf.files import read_json
from conf.schema import Config
from jobs import consolidate, preprocess
from jobs.consolidation import model_card
from jobs.evaluation import first_blocks, reference_logits
from jobs.model import build
from tests.conftest import Compose
from tests.jobs import curves, families, ranks

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = {"fsdp": ["parallel=fsdp"], "zero3": ["parallel=zero3"], "moe": ["parallel=fsdp"]}


@pytest.fixture(scope="module")
def runs(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Configs of runs of two steps on two ranks."""
    folder = tmp_path_factory.mktemp("reference")
    families.make(folder / "qwen3_moe", "qwen3_moe")
    configs = {}
    for name, words in NAMES.items():
        hub = ["model=hub", f"model.source={folder}/qwen3_moe"] if name == "moe" else []
        config = compose(*hub, *families.COMMON, "train.steps=2", *words)
        config.run_dir = str(folder / name)
        Path(config.run_dir).mkdir()
        if configs and name != "moe":
            (Path(config.run_dir) / "data").symlink_to(Path(configs["fsdp"].run_dir) / "data")
        else:
            preprocess.run(config)
        configs[name] = config
    ranks.spawn(curves.train_on_rank, 2, list(configs.values()))
    return configs


@pytest.fixture
def merged_again(runs):
    """`merged_again(name)`: merge a run anew."""

    def merge(name: str) -> Path:
        out = Path(runs[name].run_dir) / "model"
        if out.exists():
            out.rename(out.with_name(f"old-{len(list(out.parent.iterdir()))}"))
        consolidate.run(runs[name])
        return out

    return merge


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_has_the_logits_of_training(name, runs, merged_again, monkeypatch, capsys) -> None:
    out = merged_again(name)
    assert "verified  logits at 8 positions differ by" in capsys.readouterr().out
    assert read_json(out / "muster.json")["verified"]
    monkeypatch.setattr(reference_logits, "MAX_BYTES", 0)
    merged_again(name)
    said = capsys.readouterr().out
    assert "logits not compared: the model takes 0.0 GiB" in said
    assert "verified  values after the first 2 blocks at 8 positions differ by" in said


@pytest.mark.slow
@pytest.mark.parametrize("size", [reference_logits.MAX_BYTES, 0])
def test_another_model_is_not_published(size, runs, merged_again, monkeypatch) -> None:
    """The weights are right, and a wrong config makes another model of them."""
    write = model_card.write_model

    def wrong(folder, model, merge) -> None:
        model.config.rms_norm_eps = 0.1
        write(folder, model, merge)

    monkeypatch.setattr(model_card, "write_model", wrong)
    monkeypatch.setattr(reference_logits, "MAX_BYTES", size)
    with pytest.raises(RunError, match=r"differ by .* of their spread from those in training"):
        merged_again("fsdp")
    assert not (Path(runs["fsdp"].run_dir) / "model").exists()


@pytest.mark.slow
def test_a_checkpoint_without_logits_is_merged_and_that_is_said(runs, merged_again, capsys) -> None:
    found = next(Path(runs["zero3"].run_dir).glob(f"checkpoints/step-*/{reference_logits.NAME}"))
    kept = found.rename(found.with_suffix(".kept"))
    merged_again("zero3")
    assert "logits not compared: step-00000002 has none; training records them" in capsys.readouterr().out
    kept.rename(found)


def test_what_is_recorded_by_default(compose: Compose) -> None:
    config = compose()
    assert config.consolidate.verify is Verify.auto and reference_logits.are_recorded(config)
    config.train.float8 = Float8.tensorwise
    assert not reference_logits.are_recorded(config)
    assert not reference_logits.are_recorded(compose("adapter=lora"))
    assert reference_logits.are_recorded(compose("adapter=lora", "consolidate.verify=logits"))
    assert not reference_logits.are_recorded(compose("consolidate.verify=weights"))


def with_twice_the_blocks(family: str) -> tuple[str, dict[str, Any]]:
    kind, values = families.FAMILIES[family]
    blocks = next(values[name] for name in ("num_hidden_layers", "n_layer") if name in values)
    lists = {key: value * 2 for key, value in values.items() if isinstance(value, list) and len(value) == blocks}
    counts = {name: 2 * blocks for name in ("num_hidden_layers", "n_layer") if name in values}
    return kind, values | lists | counts


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "jamba", "gpt2"])
def test_the_first_blocks_of_a_folder_are_those_of_the_whole_model(
    family, compose: Compose, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, family, with_twice_the_blocks(family))
    families.make(tmp_path / "m", family)
    model = build.build(compose("model=hub", f"model.source={tmp_path}/m", *families.COMMON)).eval()
    ids = torch.arange(30, 50)
    with torch.no_grad(), first_blocks.outputs(model) as expected:
        model(input_ids=ids[None])
    with torch.no_grad():
        actual = first_blocks.hidden_of(tmp_path / "m", ids, torch.float32, False)
    assert actual is not None and len(build.blocks(model)) >= 4
    torch.testing.assert_close(actual, expected[-1])


def test_in_16_bits_a_token_may_go_to_another_expert(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    expected = torch.randn(8, 100)
    one_token = expected.clone()
    one_token[3] = torch.randn(100)
    options = {"tolerance": 0.05, "folder": tmp_path, "what": "logits"}
    reference_logits._check(one_token, expected, routed=True, **options)
    with pytest.raises(RunError):
        reference_logits._check(one_token, expected, routed=False, **options)
    with pytest.raises(RunError):
        reference_logits._check(torch.randn(8, 100), expected, routed=True, **options)
    with pytest.raises(RunError):
        reference_logits._check(expected * torch.nan, expected, routed=True, **options)
