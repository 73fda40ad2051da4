"""consolidate.verify=logits for merged models and for adapters alone, and the jobs evaluate and generate after it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conf.errors import RunError
from conf.files import read_json
from conf.resolve import load
from jobs import consolidate
from jobs.evaluation import reference_logits
from jobs.model import build
from jobs.tokenization.tokenizer import load_tokenizer
from tests.jobs import curves, ranks

pytestmark = [pytest.mark.slow, pytest.mark.proof, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def run(compose, tmp_path_factory):
    """The run folder of an adapter that two ranks trained and two ranks of consolidate wrote, and the output of its jobs."""
    folder = tmp_path_factory.mktemp("verify")
    made = build.build(compose("model=tiny"))
    made.save_pretrained(folder / "base")
    load_tokenizer(compose("model=tiny")).save_pretrained(folder / "base")
    words = [*curves.SMALL, "cluster.train.ranks_per_node=2", "train.steps=4", "train.learning_rate=1e-2"]
    words += ["model=hub", f"model.source={folder}/base", "adapter=lora", "generate.max_new_tokens=40"]
    words += ["consolidate.verify=logits", "consolidate.adapter_only=true", "cluster.cpu.ranks_per_node=2"]
    said = ranks.run(f"run_dir={folder}/run", *words, "jobs=[preprocess,train,consolidate,evaluate,generate]")
    return folder / "run", said


def test_an_adapter_is_verified_without_merging(run) -> None:
    folder, said = run
    assert (folder / "model/adapter_model.safetensors").exists() and "verified  logits at 8 positions" in said
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    live = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert abs(live[-1] - live[0]) > 0.02
    found = read_json(folder / "evaluate.json")
    assert found["loss"] == pytest.approx(live[-1], abs=1e-4) and found["model"].endswith("adapter not merged")


def test_answers_are_written_with_their_faults(run) -> None:
    """After four steps the answers are nonsense, so there is a warning."""
    folder, said = run
    found = read_json(folder / "generations.json")
    assert found["prompts"] == len(found["answers"]) == 4
    assert found["faults"] == {name: sum(name in one["faults"] for one in found["answers"]) for name in found["faults"]}
    assert any(found["faults"].values()) and "answers   4 in " in said and "no faults found" not in said
    assert "with special tokens" in (folder / "generations.html").read_text()


def test_a_merged_model_with_other_logits_is_not_published(run, tmp_path, capsys) -> None:
    config = load(run[0] / "config.yaml")
    config.run_dir = str(tmp_path / "run")
    config.consolidate.adapter_only = False
    shutil.copytree(run[0] / "checkpoints", tmp_path / "run/checkpoints")
    consolidate.run(config)
    assert "verified  logits at 8 positions" in capsys.readouterr().out
    about = read_json(tmp_path / "run/model/muster.json")
    assert about["verified"] and about["verify"] == "logits"
    shutil.rmtree(tmp_path / "run/model")
    config.adapter.alpha *= 4  # merges another update than was trained
    with pytest.raises(RunError, match="logits differ by .* of their spread"):
        consolidate.run(config)
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/.model.partial").exists()
    next((tmp_path / "run/checkpoints").glob("step-*/logits.safetensors")).unlink()
    with pytest.raises(RunError, match=r"consolidate\.verify=logits: .*training writes"):
        consolidate.run(config)


def test_the_difference_is_that_of_the_worst_position() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(3, 1000) * 5 + 7
    off = torch.zeros(3, 1000)
    off[1] = torch.randn(1000) * 0.5
    assert reference_logits.difference(wanted + off, wanted) == pytest.approx(0.1, rel=0.1)
    assert reference_logits.difference(wanted, torch.cat([wanted, torch.zeros(3, 8)], 1)) == 0


def test_files_of_logits_are_plain(run) -> None:
    found = load_file(next((run[0] / "checkpoints").glob("step-*/logits.safetensors")))
    assert found["logits"].dtype is torch.float32 and found["logits"].shape[0] == len(found["places"]) == 8
    assert found["ids"].dtype is torch.int64 and found["places"].max() == len(found["ids"]) - 1
