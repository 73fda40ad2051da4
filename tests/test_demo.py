"""The demo with its defaults, whole: it learns, the merged model loads as any other, and the run can be looked at and resumed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import CLONE, block

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The run folder of `python launch.py`, and what was printed."""
    run = tmp_path_factory.mktemp("demo") / "run"
    done = subprocess.run(
        [sys.executable, CLONE / "launch.py", f"run_dir={run}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stdout


def muster(*words):
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words], capture_output=True, text=True, cwd=CLONE, check=False
    )


def held_out(run):
    """The losses of evaluation in training, in order."""
    return [
        json.loads(line)["eval_loss"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "eval_loss" in line
    ]


def test_held_out_loss_falls_by_more_than_a_third(demo):
    losses = held_out(demo[0])
    assert losses[-1] < losses[0] * 2 / 3


def test_it_ends_with_the_table_of_the_readme(demo):
    shown = {line[:15].strip() for line in block("demo")} - {""}
    assert shown <= {line[:15].strip() for line in demo[1].splitlines()}


def test_the_model_loads_alone_and_has_the_loss_of_training(demo):
    """In a process of its own, outside the project: as a user would."""
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, words = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
chat = words.apply_chat_template([dict(role="user", content="Hi")], return_dict=True, return_tensors="pt")
print(model.generate(**chat, max_new_tokens=4, do_sample=False).shape[0], next(model.parameters()).dtype)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, demo[0] / "model"], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.stdout == "1 torch.float32\n", done.stderr
    assert json.loads((demo[0] / "evaluate.json").read_text())["loss"] == pytest.approx(held_out(demo[0])[-1], abs=1e-3)


def test_every_prompt_is_answered(demo):
    found = json.loads((demo[0] / "generations.json").read_text())
    assert len(found["answers"]) == 4
    assert found["faults"]["empty"] == found["faults"]["template"] == 0
    assert all(item["prompt"] in (demo[0] / "generations.html").read_text() for item in found["answers"])


def test_the_run_can_be_looked_at(demo):
    run = demo[0]
    assert re.search(r"^train .*completed .*\d+", muster("status", run).stdout, re.MULTILINE)
    assert "held-out loss" in muster("logs", run).stdout
    assert "train" in muster("why", run).stdout
    assert "cancelled 0 jobs" in muster("cancel", run).stdout
    assert "no log of train: there are ranks 0 to 1" in muster("logs", run, "--rank", "7").stderr


def test_resuming_a_whole_run_does_nothing(demo):
    assert "nothing to do" in muster("resume", demo[0]).stdout


def test_merging_by_hand_in_another_precision_replaces_the_model(demo):
    run = demo[0]
    before = (run / "config.yaml").read_bytes()
    done = muster("merge", run, "consolidate.dtype=bf16")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "model/config.json").read_text())["dtype"] == "bfloat16"
    assert (run / "config.yaml").read_bytes() == before
    assert Path(run / "model.1").exists()
