"""Times the phases of a training step: with CUDA events on GPUs, with the clock on CPUs. No kernel waits for a measurement.

On a GPU, a phase lasts from its first to its last kernel on the compute stream. This means:
- `data` is the time that the GPU waits for the batch.
- Communication of FSDP and ZeRO is part of `forward`, `backward` and `optimizer`, unless computation hides it.
- `blocks` is a part of `forward`: the decoder blocks, from the moment their weights are gathered. It is the rank's own work,
  without waiting for other ranks. (Exception: ZeRO-3 without compilation gathers inside a block, so waiting is included.)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PHASES = ("data", "forward", "backward", "optimizer")


class StepTimer:
    """Adds up the seconds of each phase while `enabled`. Call `read` every few steps: until then all events are kept."""

    def __init__(self, device: torch.device) -> None:
        self.enabled = False
        self._cuda = device.type == "cuda"
        self._intervals: list[tuple[str, Any, Any]] = []
        """(phase, begin, end): CUDA events on GPUs, seconds on CPUs."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with torch.profiler.record_function(phase):  # shows the phases in a profiler trace
            began = self._now() if self.enabled else None
            yield
            if began is not None:
                self._intervals.append((phase, began, self._now()))

    def time_blocks(self, blocks: list[nn.Module]) -> None:
        """Also time the forward pass of decoder blocks.

        Call this after the backend has wrapped the model. It replaces `forward`, which runs inside the hooks of FSDP and ZeRO,
        so the gathering of weights is not timed. `jobs.model.prepare` has already replaced `forward` then.
        """
        for block in blocks:
            block.forward = self._timed(block.forward)

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled:
                return forward(*args, **kwargs)
            began = self._now()
            output = forward(*args, **kwargs)
            self._intervals.append(("blocks", began, self._now()))
            return output

        return timed

    def read(self) -> dict[str, float]:
        """Seconds of each phase and of `blocks` since the last call. On GPUs, call it when all queued kernels are done."""
        seconds = dict.fromkeys((*PHASES, "blocks"), 0.0)
        for phase, began, ended in self._intervals:
            seconds[phase] += began.elapsed_time(ended) / 1000 if self._cuda else ended - began
        self._intervals.clear()
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
