"""Reads what trackers have recorded of a run, with the trackers' own readers: every point of a curve, and the config."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Points = list[tuple[int, float]]
"""(step, value), as they were written. A step that is there twice would be drawn twice."""


class WandbRun(NamedTuple):
    """What the offline files of all attempts say."""

    points: Points
    ids: set[tuple[str, ...]]
    """(id, project, group, name, *tags) of each attempt."""
    config: dict[str, Any]
    """Of the last attempt."""


def wandb_run(run: Path, metric: str) -> WandbRun:
    from wandb.proto.wandb_internal_pb2 import Record

    points, ids, config = [], set(), {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in _wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                about = record.run
                ids.add((about.run_id, about.project, about.run_group, about.display_name, *about.tags))
                config = {item.key: json.loads(item.value_json) for item in about.config.update}
            if record.HasField("history"):
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                if metric in values:
                    points.append((values["_step"], values[metric]))
    return WandbRun(points, ids, config)


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


class MlflowRun:
    """The only run of an experiment in RUN/mlruns."""

    def __init__(self, client: Any, run: Any) -> None:
        self._client, self.info, self.tags, self.params = client, run.info, run.data.tags, run.data.params

    def points(self, metric: str) -> Points:
        return [(point.step, point.value) for point in self._client.get_metric_history(self.info.run_id, metric)]


def mlflow_run(run: Path, experiment: str) -> MlflowRun:
    import mlflow

    mlflow.environment_variables.MLFLOW_ALLOW_FILE_STORE.set(True)
    client = mlflow.MlflowClient((run / "mlruns").as_uri())
    [found] = [item for item in client.search_experiments() if item.name == experiment]
    [only] = client.search_runs([found.experiment_id])
    return MlflowRun(client, only)


def tensorboard_run(run: Path, metric: str) -> tuple[Points, list[str]]:
    """(points, names of texts)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(metric)], events.Tags()["tensors"]
