"""Measures each training step on each rank: tokens/s, MFU, time per phase, memory. Gathers it for log lines, with warnings."""

import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from conf.choices import Precision
from conf.schema import Config
from jobs.data.batches import Rows
from jobs.distributed.collectives import gather
from jobs.distributed.process_group import World
from jobs.monitoring import stragglers
from jobs.monitoring.flops import ModelFlops, peak_flops
from jobs.monitoring.step_timer import PHASES, StepTimer

TIMED_STEPS = 10
"""At most this many steps before a log line are timed, because their CUDA events are kept until that line."""


class StepMonitor:
    """Measures every step on every rank. Ranks exchange their measurements only when a log line is due."""

    def __init__(self, config: Config, world: World, *, rows: Rows, flops: ModelFlops, blocks: list[nn.Module]) -> None:
        self.timer = StepTimer(world.device)
        self.timer.time_blocks(blocks)
        hosts = gather(socket.gethostname)
        self.nodes = hosts[:: world.local_size]
        """Host name of each node."""
        self._world, self._rows, self._flops = world, rows, flops
        self._log_every = config.train.log_every
        self._squared_lengths = rows.packs.sums(rows.samples.lengths[rows.chosen].astype(np.float64) ** 2)
        self._peak_flops = _device_peak_flops(config, world)
        self._stragglers = stragglers.StragglerDetector(hosts)
        self._cost = 0.0
        """What this rank's micro batches of the timed steps should cost (jobs.data.packing.attention_cost)."""
        self._timed_steps = 0

    def begin_step(self, step: int, last_step: int) -> None:
        """Call before each step, counted from 0. Turns the timer on for the last steps before a log line."""
        next_line = min(last_step, (step // self._log_every + 1) * self._log_every)
        self.timer.enabled = next_line - step <= TIMED_STEPS
        if self.timer.enabled:
            self._timed_steps += 1

    def add_micro_batch(self, rows: int, highest_cost: float) -> None:
        """Call for each micro batch of this rank. All its rows are padded to the longest, so each costs `highest_cost`."""
        if self.timer.enabled:
            self._cost += rows * highest_cost

    def end_step(self, chosen: NDArray[np.int64], seconds: float) -> dict[str, float]:
        """Call after each step with the rows of its global batch, int64 of shape (rows,), and its seconds.

        Returns tokens/s without padding, and on known GPUs the MFU: needed FLOP/s over the peak FLOP/s of all ranks.
        """
        self.timer.enabled = False  # an evaluation may come before the next step
        tokens, trained_tokens = (int(counts[chosen].sum()) for counts in (self._rows.lengths, self._rows.label_counts))
        per_rank = tokens / seconds / self._world.size
        measured = {
            "tokens_per_s": round(per_rank * self._world.size, 1),
            "tokens_per_s_per_rank": round(per_rank, 1),
        }
        if self._peak_flops:
            flops = self._flops.training(
                tokens=tokens,
                trained_tokens=trained_tokens,
                squared_lengths=float(self._squared_lengths[chosen].sum()),
            )
            measured["mfu"] = round(flops / seconds / self._world.size / self._peak_flops, 4)
        return measured

    def gather(self) -> tuple[dict[str, float], list[str]]:
        """(measurements, warnings) of all ranks since the last call. Collective: all ranks call this after the same step.

        Seconds of a phase are per step, the mean over ranks and timed steps. Memory is the peak since the rank started.
        """
        seconds = self.timer.read()
        local = [*seconds.values(), self._cost, float(peak_memory_bytes(self._world.device))]
        steps = max(1, self._timed_steps)
        self._cost, self._timed_steps = 0.0, 0
        sent = torch.tensor(local, dtype=torch.float64, device=self._world.device)
        received = [torch.empty_like(sent) for _ in range(self._world.size)]
        dist.all_gather(received, sent)
        by_rank = np.array([values.tolist() for values in received])
        *phases, blocks, cost, memory = by_rank.T
        measured = {
            f"{name}_s": round(float(values.mean()) / steps, 5) for name, values in zip(PHASES, phases, strict=True)
        }
        measured |= stragglers.summary("memory_gib", memory / stragglers.GIB)
        # a rank waits for others in all phases but these two
        busy = blocks + phases[PHASES.index("data")]
        return measured, self._stragglers.warnings(memory=memory, busy=busy, cost=cost)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: of torch's tensors on a GPU; of this process (resident) on CPUs.

    Read from /proc, because getrusage also counts what the parent process had before it started this one. 0 without /proc.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM:")), 0)


def log_fields(values: dict[str, Any], *, on_gpu: bool) -> dict[str, str]:
    """A step's values, as in metrics.jsonl, as {label: text} for a log line."""
    fields = {
        "loss": f"{values['loss']:.4f}",
        "norm": f"{values['grad_norm']:.3f}",
        "lr": f"{values['learning_rate']:.2e}",
        "tokens/s": f"{values['tokens_per_s']:,.0f}",
    }
    if on_gpu:
        fields["per GPU"] = f"{values['tokens_per_s_per_rank']:,.0f}"
    if "mfu" in values:
        fields["MFU"] = f"{values['mfu']:.1%}"
    seconds = {name: values[f"{name}_s"] for name in PHASES}
    total = math.fsum(seconds.values()) or 1.0
    shares = ", ".join(f"{name} {phase_s / total:.0%}" for name, phase_s in seconds.items())
    fields["took"] = f"{values['seconds']:.2f} s ({shares})"
    low, high = values["memory_gib_min"], values["memory_gib_max"]
    fields["GiB"] = f"{high:.1f}" if high - low < 0.05 else f"{low:.1f} to {high:.1f}"
    return fields


def _device_peak_flops(config: Config, world: World) -> float | None:
    """bf16 peak of this rank's GPU in FLOP/s. None on CPUs and for other precisions, which have other peaks."""
    if world.device.type != "cuda" or config.train.precision is not Precision.bf16:
        return None
    return peak_flops(torch.cuda.get_device_name(world.device))
