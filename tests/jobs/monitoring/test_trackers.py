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

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [
    "tracker.project=tunes",
    "tracker.group=g",
    "tracker.tags=[first,second]",
    "tracker.notes=hello",
    "cluster.offline=true",
]


@pytest.fixture
def train_twice(compose: Compose, tmp_path: Path) -> Callable[..., Path]:
    """Steps 1 to 6, then 6 to 10 after a resume from step 5, as a killed attempt and its successor write them."""

    def train(tracker: str, *words: str) -> Path:
        config = compose(f"run_dir={tmp_path}/run", f"tracker={tracker}", *WORDS, *words)
        assert not list(packages.missing(config))
        Path(config.run_dir).mkdir()
        for first, last, resumed in ((1, 6, 0), (6, 10, 5)):
            running = Trackers(config, resumed)
            assert [each.name for each in running.trackers] == [tracker]
            for step in range(first, last + 1):
                running.log({"loss": 1.0 / step, "not a number": "x"}, step)
            running.finish()
            assert running.trackers
        return Path(config.run_dir)

    return train


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB, after W&B's header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:  # the rest of a block that has no room for a header
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_keeps_one_run_with_its_config(train_twice: Callable[..., Path]) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run, found, ids = train_twice("wandb"), {}, set()
    wandb.teardown()  # as at the end of a process: its service has then written everything
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in _wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(
                    (
                        record.run.run_id,
                        record.run.project,
                        record.run.run_group,
                        record.run.display_name,
                        *record.run.tags,
                    )
                )
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert config["train"]["global_batch"] == 64
            if record.HasField("history"):
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found[values["_step"]] = values["loss"]
    assert found == {step: pytest.approx(1 / step) for step in range(1, 11)}
    [(identifier, *rest)] = ids
    assert rest == ["tunes", "g", "run", "first", "second"]
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
    mlflow = pytest.importorskip("mlflow")
    run = train_twice("mlflow")
    client = mlflow.MlflowClient((run / "mlruns").as_uri())
    [experiment] = [item for item in client.search_experiments() if item.name == "tunes"]
    [only] = client.search_runs([experiment.experiment_id])
    assert {point.step: point.value for point in client.get_metric_history(only.info.run_id, "loss")} == {
        step: pytest.approx(1 / step) for step in range(1, 11)
    }
    assert only.info.status == "FINISHED" and only.data.tags["group"] == "g" and only.info.run_name == "run"
    assert only.data.params["train.global_batch"] == "64"


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
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(train_twice("tensorboard") / "tensorboard"))
    events.Reload()
    assert sorted(event.step for event in events.Scalars("loss")) == list(range(1, 11))
    assert "config/text_summary" in events.Tags()["tensors"]


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
