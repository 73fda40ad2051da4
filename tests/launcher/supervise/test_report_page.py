"""RUN/report.html of a training that was killed: it says how the training ended, not that it runs."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from conf import resolve
from conf.files import read_json, write_json
from launcher import __main__ as muster
from launcher.supervise import attempt, report_page
from pages.report import Progress, render_html
from tests.conftest import Compose, Programs, put
from tests.pages.html import parsed

LINE = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_s": 9.0, "time": 1000.0}


@pytest.fixture
def run(tmp_path: Path, compose: Compose) -> Path:
    """A run whose page says that it trains."""
    config = put(compose("cluster=slurm"), {"run_dir": str(tmp_path / "run")})
    run = tmp_path / "run"
    resolve.save(config, run / "config.yaml")
    (run / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    write_json(run / "jobs/train/attempt-1/begin.json", {"started": 990.0, "job_id": "7", "host": "n1"})
    progress = Progress("training", 18, 2, "1 node, 2 ranks on CPUs", ["step 1: slow"])
    write_json(run / "report.json", asdict(progress))
    (run / "report.html").write_text(render_html(config, run / "metrics.jsonl", progress))
    launch = {"command": [], "time": "2026-11-30T12:00:00+0000", "cluster": "slurm", "jobs": {"train": "7"}}
    write_json(run / "run.json", {"launches": [launch]})
    return run


def said(run: Path) -> str:
    return " ".join(" ".join(parsed((run / "report.html").read_text()).texts).split())


def finished(run: Path, programs: Programs) -> None:
    attempt.record_end(run / "jobs/train", 1, 0, "out_of_memory", "GPU memory is full")
    attempt.finish(run / "jobs/train", 1, 1, 2)


def lost(run: Path, programs: Programs) -> None:
    programs(squeue="exit 0", sacct="echo '7|NODE_FAIL'", scontrol="exit 1")
    assert muster.main(["status", str(run)]) == 1


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [(finished, "out_of_memory", "GPU memory is full"), (lost, "bad_node", "Slurm lost a node of the job")],
)
def test_the_page_shows_how_the_training_ended(
    run: Path, programs: Programs, end: Callable[[Path, Programs], None], status: str, reason: str
) -> None:
    assert "refresh every 30 s" in said(run)
    end(run, programs)
    assert f": {status}" in (run / "report.html").read_text().partition("</title>")[0]
    assert reason in said(run)
    assert "step 1: slow" in said(run)
    assert "refresh every 30 s" not in said(run)
    assert (read_json(run / "report.json") or {})["state"] == status
    before = (run / "report.html").stat().st_mtime_ns
    assert not report_page.settle(run, {"status": "failed"}), "it says already how the training ended"
    assert (run / "report.html").stat().st_mtime_ns == before


def test_while_it_trains_the_page_is_left_alone(run: Path, programs: Programs) -> None:
    programs(squeue="echo '7|RUNNING'")
    assert muster.main(["status", str(run)]) == 0
    assert (read_json(run / "report.json") or {})["state"] == "training"
