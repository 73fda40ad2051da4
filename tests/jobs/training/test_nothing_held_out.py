"""data.validation_fraction=0 from one row to a verified model: training, merge and evaluation without validation rows."""

import json
from pathlib import Path

import pytest

from conf.files import read_json
from launcher.status import tables
from tests.jobs import curves, ranks

pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]


def test_one_row_trains_to_a_verified_model_without_a_held_out_loss(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "The only row there is."}) + "\n")
    words = [*curves.SMALL, f"data.path={tmp_path}/one.jsonl", "data.validation_fraction=0", "data.packing=true"]
    words += ["cluster.train.ranks_per_node=2", "train.steps=3", "train.global_batch=2", "train.eval_every=1"]
    words += ["consolidate.verify=logits", "jobs=[preprocess,train,consolidate,evaluate]"]
    output = ranks.run(f"run_dir={tmp_path}/run", *words)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert not any("eval_loss" in line for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "verified  logits at" in output
    assert "no rows are held out (data.validation_fraction=0), so there is no held-out loss" in output
    assert read_json(run / "evaluate.json") == {
        "loss": None,
        "perplexity": None,
        "tokens": 0,
        "model": "step-00000003 in fp32",
    }
    assert "held-out" not in (run / "report.html").read_text()
    assert not {"held-out loss", "merged model"} & {name for name, _ in tables.result_rows(run)}
