"""Records a few training steps with torch's profiler and writes RUN/profile/*.json.gz, if `train.profile` asks for it."""

import logging
import os
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from conf.schema import Config
from jobs.distributed.process_group import World

log = logging.getLogger(__name__)

WAIT_STEPS = 3
"""Steps that are skipped: the first ones compile, allocate memory and read data."""
WARMUP_STEPS = 1
"""Steps in which the profiler warms up."""
RECORDED_STEPS = 3


class Profiler:
    """Profiles the ranks of `train.profile_ranks`. On other ranks, and without `train.profile`, every call does nothing."""

    def __init__(self, config: Config, world: World, *, first_step: int, last_step: int) -> None:
        self._profiler: Any = None
        self._folder = Path(config.run_dir) / "profile"
        self._rank = world.rank
        steps_left = last_step - first_step
        if not config.train.profile or world.rank not in config.train.profile_ranks or steps_left <= 0:
            return
        wait = max(0, min(WAIT_STEPS, steps_left - WARMUP_STEPS - RECORDED_STEPS))  # a short run skips fewer steps
        self._first_recorded = first_step + wait + WARMUP_STEPS + 1
        self._last_recorded = min(last_step, first_step + wait + WARMUP_STEPS + RECORDED_STEPS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=WARMUP_STEPS, active=RECORDED_STEPS, repeat=1),
            on_trace_ready=self._write,
            # without this, torch 2.11 warns that events of earlier cycles are dropped, although there is only one cycle
            acc_events=True,
        )
        self._profiler.start()

    def step(self) -> None:
        """Tell the profiler that a training step has ended."""
        if self._profiler:
            self._profiler.step()

    def close(self) -> None:
        """Stop profiling at the end of training. Steps recorded so far are written."""
        if self._profiler:
            self._profiler.stop()
            self._profiler = None

    def _write(self, finished: Any) -> None:
        """Write the trace under a temporary name, then rename it. The step numbers in the name keep attempts apart."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first_recorded}-{self._last_recorded}.rank-{self._rank}.json.gz"
        temporary = path.with_name(f".{path.name}")
        finished.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
        log.info(f"profile   {path}: open it at https://ui.perfetto.dev or in chrome://tracing")
