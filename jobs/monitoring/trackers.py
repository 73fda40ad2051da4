"""Sends metrics to the trackers that the section `tracker` names: Weights & Biases, TensorBoard, MLflow, Comet.

A resumed run continues the curves of its earlier attempts. A tracker that fails never ends a training.
"""

import logging
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from conf import resolve
from conf.errors import first_line
from conf.files import read_json, write_json
from conf.schema import Config

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 60
"""W&B waits this long for its server before the run is recorded offline."""


class Tracker(NamedTuple):
    """A tracker that has started."""

    name: str
    log: Callable[[Mapping[str, float], int], object]
    """Called with the numbers of a step, and the step."""
    finish: Callable[[], object]


class Trackers:
    """All trackers of a run, on rank 0. A tracker that raises an error is dropped, with one warning."""

    def __init__(self, config: Config, first_step: int) -> None:
        """Start them. `first_step` is the step of the checkpoint that training resumes from, 0 for a new run."""
        starts = {"wandb": _wandb, "tensorboard": _tensorboard, "mlflow": _mlflow, "comet": _comet}
        self.trackers: list[Tracker] = []
        for name, start in starts.items():
            if getattr(config.tracker, name):
                error = _error_of(name, lambda start=start: self.trackers.append(start(config, first_step)))  # type: ignore[misc]
                if error:
                    log.warning(f"tracker: {error}; training goes on without it")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send the numbers among `values`."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(numbers, step))

    def finish(self) -> None:
        """Send what is left."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, work: Callable[[Tracker], object]) -> None:
        for tracker in list(self.trackers):
            if error := _error_of(tracker.name, lambda tracker=tracker: work(tracker)):  # type: ignore[misc]
                log.warning(f"tracker: {error}; it gets no more metrics of this attempt")
                self.trackers.remove(tracker)


def _error_of(name: str, work: Callable[[], object]) -> str | None:
    """Call `work`. Returns what went wrong: these libraries raise errors of any class for a server that is away."""
    try:
        work()
    except Exception as error:
        return f"{name} failed ({first_line(error)})"
    return None


def _id(config: Config, tracker: str, make: Callable[[], str] = lambda: uuid.uuid4().hex) -> str:
    """The id that `make` returned in the first attempt, the same for all attempts of a run. RUN/tracker.json keeps it.

    It is random: the name of the run folder cannot be the id, because runs of other projects may have the same name.
    """
    path = Path(config.run_dir) / "tracker.json"
    ids: dict[str, str] = read_json(path) or {}
    if tracker not in ids:
        ids[tracker] = make()
        write_json(path, ids)
    return ids[tracker]


def _run_name(config: Config) -> str:
    return config.tracker.run_name or Path(config.run_dir).name


def _wandb(config: Config, first_step: int) -> Tracker:
    import wandb

    tracker = config.tracker

    def start(mode: Any) -> Any:
        return wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            name=_run_name(config),
            group=tracker.group,
            tags=tracker.tags,
            notes=tracker.notes,
            config=resolve.plain(config),
            allow_val_change=True,  # a resume may change some keys
            id=_id(config, "wandb"),
            resume="allow",
            dir=config.run_dir,
            mode=mode,
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S, console="off"),
        )

    try:
        run = start("offline" if config.cluster.offline else None)
    except Exception as error:  # no key, no network, no permission: keep the metrics
        log.warning(
            f"tracker: W&B cannot be used now ({first_line(error)}); metrics are kept in RUN/wandb, `muster sync RUN` sends them"
        )
        run = start("offline")
    return Tracker("wandb", lambda values, step: run.log(dict(values), step=step), run.finish)


def _tensorboard(config: Config, first_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    purge_step = first_step + 1 if first_step else 0  # hides what a killed attempt wrote after its checkpoint
    folder = Path(config.run_dir) / "tensorboard"
    writer = SummaryWriter(str(folder), purge_step=purge_step)
    writer.add_text("config", f"```yaml\n{resolve.dump(config)}\n```", first_step)

    def log_values(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", log_values, writer.close)


def _mlflow(config: Config, first_step: int) -> Tracker:
    import mlflow

    tracker = config.tracker
    if tracker.uri or not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(tracker.uri or (Path(config.run_dir) / "mlruns").as_uri())
        # MLflow 3.17 refuses a folder unless it is allowed; its other local store, SQLite, locks on shared file systems
        if allowed := getattr(mlflow.environment_variables, "MLFLOW_ALLOW_FILE_STORE", None):
            allowed.set(True)
    client = mlflow.MlflowClient()
    run_id = _id(config, "mlflow", lambda: _mlflow_run(client, config))
    client.set_terminated(run_id, "RUNNING")
    parameters = client.get_run(run_id).data.params
    for key, value in _mlflow_parameters(config).items():
        if parameters.get(key) != value:  # MLflow never changes a parameter
            client.set_tag(run_id, f"{key} after step {first_step}", value)

    @cache
    def last_step(name: str) -> int:
        """Of a killed attempt, which may have gone on after its checkpoint. MLflow would keep both values of a step."""
        return max((point.step for point in client.get_metric_history(run_id, name)), default=-1)

    def log_values(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if step > last_step(name):
                client.log_metric(run_id, name, value, step=step)

    return Tracker("mlflow", log_values, lambda: client.set_terminated(run_id, "FINISHED"))


def _mlflow_run(client: Any, config: Config) -> str:
    """Create a run with its tags and the whole config. Returns its id."""
    tracker = config.tracker
    tags = {tag: "true" for tag in tracker.tags}
    tags |= {"group": tracker.group} if tracker.group else {}
    tags |= {"mlflow.note.content": tracker.notes} if tracker.notes else {}
    experiment = client.get_experiment_by_name(tracker.project)
    number = experiment.experiment_id if experiment else client.create_experiment(tracker.project)
    run_id: str = client.create_run(number, run_name=_run_name(config), tags=tags).info.run_id
    for key, value in _mlflow_parameters(config).items():
        client.log_param(run_id, key, value)
    return run_id


def _mlflow_parameters(config: Config) -> dict[str, str]:
    """The whole config, each value cut to the longest that MLflow takes."""
    return {key: str(value)[:6000] for key, value in resolve.flat(resolve.plain(config)).items()}


def _comet(config: Config, first_step: int) -> Tracker:
    import comet_ml

    tracker = config.tracker
    experiment = comet_ml.start(
        workspace=tracker.entity,
        project_name=tracker.project,
        experiment_key=_id(config, "comet"),
        mode="get_or_create",
        online=not config.cluster.offline,
        experiment_config=comet_ml.ExperimentConfig(
            name=_run_name(config),
            tags=[*tracker.tags, *([tracker.group] if tracker.group else [])],
            offline_directory=str(Path(config.run_dir) / "comet"),
            log_code=False,
            log_git_metadata=False,
            log_git_patch=False,
        ),
    )
    experiment.log_parameters(resolve.flat(resolve.plain(config)))
    if tracker.notes:
        experiment.log_other("notes", tracker.notes)
    return Tracker("comet", lambda values, step: experiment.log_metrics(dict(values), step=step), experiment.end)
