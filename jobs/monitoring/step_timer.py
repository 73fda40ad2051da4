"""Times the phases of a step where they run: CUDA events on GPUs, read when their work is done anyway; the clock on CPUs.

On a GPU a phase is what lies between its first and last kernel on the compute stream. So `data` is how long the GPU waited for
the batch; communication of FSDP and ZeRO lies in `forward`, `backward` and `optimizer`, as far as computation does not hide
it. `blocks` is inside `forward`: the decoder blocks once their weights are there, which is a rank's own work without waiting
for others (ZeRO-3 without compilation gathers inside a block, where it waits after all).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NAMES = ("data", "forward", "backward", "optimizer")


class Phases:
    """Adds up seconds by phase while `on`; between two calls of `read` at most a few steps of it, for events take memory."""

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with torch.profiler.record_function(name):  # so that a trace shows the phases
            began = self._now() if self.on else None
            yield
            if began is not None:
                self._marks.append((name, began, self._now()))

    def around(self, blocks: list[nn.Module]) -> None:
        """Also time the forwards of these, inside what FSDP and ZeRO hook to their calls; `jobs.model.prepare` has
        been here before."""
        for block in blocks:
            block.forward = self._timed(block.forward)  # type: ignore[method-assign]

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return forward(*args, **kwargs)
            began = self._now()
            found = forward(*args, **kwargs)
            self._marks.append(("blocks", began, self._now()))
            return found

        return timed

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call. On GPUs for a moment at which they have done all that was asked."""
        found = dict.fromkeys((*NAMES, "blocks"), 0.0)
        for name, began, ended in self._marks:
            found[name] += began.elapsed_time(ended) / 1000 if self._cuda else ended - began
        self._marks.clear()
        return found

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
