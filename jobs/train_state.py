"""What the training loop of jobs.train holds, and the sums that all ranks agree on in each step."""

from dataclasses import dataclass
from typing import NamedTuple

from conf.schedule import Interval
from conf.schema import Config
from jobs import backends
from jobs.checkpoint.async_save import Saver
from jobs.data import batches
from jobs.data.sampler import RowSampler
from jobs.distributed import stop_signals
from jobs.distributed.process_group import World
from jobs.monitoring.metrics import Metrics
from jobs.monitoring.profiler import Profiler
from jobs.monitoring.step_monitor import StepMonitor
from jobs.training.divergence import DivergenceDetector
from jobs.training.early_stopping import HeldOutLosses
from jobs.training.flat_loss import FlatLossWatch
from jobs.training.sweep_rung import PlannedRung


@dataclass(frozen=True, kw_only=True)
class Training:
    """All that the training loop uses; `engine` is the sharded model and its optimizer. Set up once, never replaced."""

    config: Config
    world: World
    stop: stop_signals.StopFlag
    backend: backends.Backend
    engine: backends.Engine
    train_rows: batches.Rows
    validation_rows: batches.Rows
    sampler: RowSampler
    pad_token: int
    last_step: int
    evaluations: Interval
    saves: Interval
    held_out: HeldOutLosses
    metrics: Metrics
    monitor: StepMonitor
    divergence: DivergenceDetector
    flat_loss: FlatLossWatch
    sweep_rung: PlannedRung
    profiler: Profiler
    saver: Saver

    @property
    def is_over(self) -> bool:
        """Whether training ends before its last step, because of its losses."""
        return self.held_out.is_over or self.sweep_rung.is_over


class StepTotals(NamedTuple):
    """Sums over all ranks, from the all-reduce at the end of a step."""

    loss: float
    """Over the trained tokens of the global batch. Each rank of a tensor-parallel group adds the same sum."""
    router_loss: float
    """With its coefficient: the sum of each rank's mean over its micro batches. 0 for a model without one."""
    stop_requests: float
    """Ranks that were asked to stop."""
    save_requests: float
    """1 if rank 0 was asked for a checkpoint."""
    finished_writes: float
    """Ranks that have written their part of the pending checkpoint in the background."""
    overtaken: float
    """1 if rank 0 has found this run among the worst of a sweep."""


class Requests(NamedTuple):
    """What any rank was asked for before the end of a step. All ranks have the same."""

    stop: bool
    save: bool
    is_overtaken: bool
    """Whether this run of a sweep is among the worst now, by the losses of runs that came as far later (`sweep.stop_worst`)."""
