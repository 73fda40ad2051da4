"""`pipeline=fetch` downloads from a Hub on this machine with the real clients; the run then starts without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from conf import resolve
from tests.conftest import ROOT
from tests.hub_server import Hub, account

ROWS = b"".join(json.dumps({"text": f"row {number} of the set"}).encode() + b"\n" for number in range(40))


@pytest.fixture
def words(hub: Hub, tmp_path: Path) -> list[str]:
    """The command line of a run whose model, tokenizer and rows are on the Hub; the model is gated."""
    shape = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    shutil.copytree(ROOT / "examples/tokenizer", tmp_path / "model", dirs_exist_ok=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.tokens["hf_r"] = account("friend", "read")
    hub.add("model", "owner/model", files | {"pytorch_model.bin": b"the same again"}, gated_for=("friend",))
    hub.add("dataset", "owner/rows", {"README.md": b"", "data/train.jsonl": ROWS})
    small = [
        "data.max_length=32",
        "train.global_batch=2",
        "train.steps=2",
        "train.log_every=1",
        "cluster.train.ranks_per_node=1",
    ]
    return [
        *("model=hub", "model.source=owner/model", "data=jsonl", "data.path=owner/rows"),
        *("cluster.offline=true", f"cluster.hf_home={tmp_path}/hf", *small),
    ]


def launch(tmp_path: Path, hub: Hub, *words: str, token: str | None = "hf_r") -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_ENDPOINT": hub.endpoint, "CUDA_VISIBLE_DEVICES": ""}
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, ROOT / "launch.py", *words]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("pipeline", ["preprocess", pytest.param("train", marks=pytest.mark.proof)])
def test_an_offline_run_starts_with_the_commits_that_were_fetched(
    hub: Hub, words: list[str], tmp_path: Path, pipeline: str
) -> None:
    refused = launch(tmp_path, hub, *words, "run_dir=run", f"pipeline={pipeline}")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 2  # the model, the rows
    [command] = {line.rpartition("python launch.py ")[2] for line in refused.stderr.splitlines()}
    assert command == " ".join([*words, "pipeline=fetch"])

    done = launch(tmp_path, hub, *command.split(), "run_dir=fetched")
    assert done.returncode == 0, done.stdout + done.stderr
    model, rows = (
        hub.repositories[item].refs["main"] for item in (("model", "owner/model"), ("dataset", "owner/rows"))
    )
    record = json.loads((tmp_path / "hf/muster-fetched.json").read_text())
    assert record == {"model owner/model main": model, "dataset owner/rows main": rows}
    for line in (f"fetched   model owner/model main is commit {model}", "fetched   owner/rows: 40 rows"):
        assert line in done.stdout
    assert not [line for line in hub.requests if "pytorch_model" in line]  # the weights, once

    hub.repositories["model", "owner/model"].commit({})  # both move on
    hub.repositories["dataset", "owner/rows"].commit({})
    hub.requests.clear()
    done = launch(tmp_path, hub, *words, "run_dir=run", f"pipeline={pipeline}", token=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.requests == []
    config = resolve.load(tmp_path / "run/config.yaml")
    assert (config.model.revision, config.data.revision) == (model, rows)
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir() == (pipeline == "train")

    again = launch(tmp_path, hub, *words, "run_dir=run", f"pipeline={pipeline}", token=None)
    assert "nothing to do" in again.stdout, again.stderr
