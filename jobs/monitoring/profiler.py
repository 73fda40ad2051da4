"""Writes a trace of a few steps by torch's profiler, where `train.profile` asks for it: RUN/profile/*.json.gz."""

import logging
import os
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from conf.schema import Config
from jobs.distributed.process_group import World

log = logging.getLogger(__name__)

WAIT, WARMUP, ACTIVE = 3, 1, 3
"""Steps that are left alone (the first ones compile, allocate and read), that the profiler warms up in, and that it records."""


class Trace:
    """On the ranks of `train.profile_ranks`; on others, and without `train.profile`, every call does nothing."""

    def __init__(self, config: Config, world: World, step: int, steps: int) -> None:
        self._profiler: Any = None
        self._folder = Path(config.run_dir) / "profile"
        self._rank, self._first = world.rank, step
        if not config.train.profile or world.rank not in config.train.profile_ranks or step >= steps:
            return
        wait = max(0, min(WAIT, steps - step - WARMUP - ACTIVE))  # a short run is recorded sooner
        self._first, self._last = step + wait + WARMUP + 1, min(steps, step + wait + WARMUP + ACTIVE)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
        plan = schedule(wait=wait, warmup=WARMUP, active=ACTIVE, repeat=1)
        # acc_events: else torch 2.11 warns that it keeps no events of former cycles, of which there are none
        self._profiler = profile(activities=kinds, schedule=plan, on_trace_ready=self._write, acc_events=True)
        self._profiler.start()

    def step(self) -> None:
        """A training step has ended."""
        if self._profiler:
            self._profiler.step()

    def close(self) -> None:
        """Training ends; what has been recorded of steps until then is written."""
        if self._profiler:
            self._profiler.stop()
            self._profiler = None

    def _write(self, done: Any) -> None:
        """Publish whole: beside first, then under its name, which tells attempts apart by their steps."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first}-{self._last}.rank-{self._rank}.json.gz"
        beside = path.with_name(f".{path.name}")
        done.export_chrome_trace(str(beside))
        os.replace(beside, path)
        log.info(f"profile   {path}: drop it onto https://ui.perfetto.dev, or open chrome://tracing")
