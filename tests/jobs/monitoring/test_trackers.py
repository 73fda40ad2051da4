"""Each tracker for real, on this machine: two attempts of one run, and what the tracker's own reader finds of them."""

import json
import logging
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf import packages
from jobs.monitoring import trackers
from jobs.monitoring.trackers import Trackers
from launcher import sync
from tests.conftest import Compose
from tests.jobs.monitoring import recorded

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [
    "tracker.project=tunes",
    "tracker.group=g",
    "tracker.tags=[first,second]",
    "tracker.notes=hello",
    "cluster.offline=true",
]
LOSSES = {step: pytest.approx(1 / step) for step in range(1, 11)}


@pytest.fixture
def train_twice(compose: Compose, tmp_path: Path) -> Callable[..., Path]:
    """Steps 1 to 6, then 6 to 10 after a resume from step 5, as a killed attempt and its successor write them.

    The learning rate changes at the resume.
    """

    def train(tracker: str, *words: str) -> Path:
        config = compose(f"run_dir={tmp_path}/run", f"tracker={tracker}", *WORDS, *words)
        assert not list(packages.missing(config))
        Path(config.run_dir).mkdir()
        for first, last, resumed in ((1, 6, 0), (6, 10, 5)):
            config.train.learning_rate = 0.5 if resumed else 0.25
            running = Trackers(config, resumed)
            assert [each.name for each in running.trackers] == [tracker]
            for step in range(first, last + 1):
                running.log({"loss": 1.0 / step, "not a number": "x"}, step)
            running.finish()
            assert running.trackers
        return Path(config.run_dir)

    return train


@pytest.mark.slow
def test_wandb_keeps_one_run_with_its_config(train_twice: Callable[..., Path]) -> None:
    wandb = pytest.importorskip("wandb")
    run = train_twice("wandb")
    wandb.teardown()  # as at the end of a process: its service has then written everything
    found = recorded.wandb_run(run, "loss")
    assert dict(found.points) == LOSSES
    [(identifier, *rest)] = found.ids
    assert rest == ["tunes", "g", "run", "first", "second"]
    assert found.config["train"]["learning_rate"] == 0.5 and found.config["train"]["global_batch"] == 64
    [command] = sync.commands(run, sys.executable)
    assert command[1:4] == ["-m", "wandb", "sync"] and len(command) == 6


@pytest.fixture(autouse=True)
def no_server_of_another_test() -> Iterator[None]:
    """MLflow keeps a server's address for the whole process."""
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)


@pytest.mark.slow
def test_mlflow_keeps_one_run_with_its_config(train_twice: Callable[..., Path]) -> None:
    pytest.importorskip("mlflow")
    only = recorded.mlflow_run(train_twice("mlflow"), "tunes")
    assert dict(only.points("loss")) == LOSSES and len(only.points("loss")) == len(LOSSES)
    assert only.info.status == "FINISHED" and only.tags["group"] == "g" and only.info.run_name == "run"
    assert only.params["train.global_batch"] == "64" and only.tags["train.learning_rate after step 5"] == "0.5"


@pytest.mark.slow
def test_comet_keeps_one_experiment(train_twice: Callable[..., Path]) -> None:
    pytest.importorskip("comet_ml")
    run, steps, keys = train_twice("comet"), set(), set()
    for path in run.glob("comet/*.zip"):
        with zipfile.ZipFile(path) as archive:
            lines = [json.loads(line) for line in archive.read("messages.json").splitlines()]
            keys.add(json.loads(archive.read("experiment.json"))["offline_id"])
            assert not [name for name in archive.namelist() if "git" in name]
        metrics = [line["payload"]["metric"] for line in lines if line["type"] == "metric_msg"]
        steps |= {int(metric["step"]) for metric in metrics if metric["metricName"] == "loss"}
    assert steps == set(range(1, 11))
    assert len(keys) == 1
    [command] = sync.commands(run, sys.executable)
    assert command[1:3] == ["-m", "comet_ml.scripts.comet_upload"]


@pytest.mark.slow
def test_tensorboard_shows_one_curve(train_twice: Callable[..., Path]) -> None:
    pytest.importorskip("tensorboard")
    points, tags = recorded.tensorboard_run(train_twice("tensorboard"), "loss")
    assert dict(points) == LOSSES and len(points) == len(LOSSES)
    assert "config/text_summary" in tags


def test_a_tracker_that_fails_does_not_end_training(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    running = Trackers(compose(f"run_dir={tmp_path}", "tracker=mlflow", "tracker.uri=http://127.0.0.1:9"), 0)
    assert not running.trackers
    running.log({"loss": 1.0}, 1)
    running.finish()
    assert "tracker: mlflow failed" in caplog.text and "training goes on without it" in caplog.text


def test_wandb_without_a_network_records_offline(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(trackers, "INIT_TIMEOUT_S", 3)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    running = Trackers(compose(f"run_dir={tmp_path}", "tracker=wandb"), 0)
    running.log({"loss": 1.0}, 1)
    running.finish()
    assert "`muster sync RUN` sends them" in caplog.text
    assert len(sync.commands(tmp_path, sys.executable)) == 1
