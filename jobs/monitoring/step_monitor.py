"""What is seen of training beside its loss: speed and utilisation, where steps spend their time, memory and slow ranks."""

import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from conf.choices import AdapterKind, Precision
from conf.schema import Config
from jobs.data.batches import Rows
from jobs.distributed.collectives import gather
from jobs.distributed.process_group import World
from jobs.model import unwrap
from jobs.monitoring import stragglers
from jobs.monitoring.flops import Work, peak
from jobs.monitoring.step_timer import NAMES, Phases

MEASURED = 10
"""Steps before a line of the log whose phases are timed, at most: their events are kept until then."""


class Watch:
    """Measures each step on each rank. What ranks measured is gathered where a line of the log is due, and never else."""

    def __init__(self, config: Config, world: World, work: Work, rows: Rows) -> None:
        self.phases = Phases(world.device)
        hosts = gather(socket.gethostname)
        self.nodes = hosts[:: world.local_size]
        """Their names."""
        self._world, self._work, self._rows, self._every = world, work, rows, config.train.log_every
        self._squares = rows.packs.sums(rows.samples.lengths[rows.chosen].astype(np.float64) ** 2)
        self._peak = _peak(config, world)
        self._spread = stragglers.Spread(hosts)
        self._cost, self._steps = 0.0, 0

    def begin(self, step: int, steps: int) -> None:
        """Before a step, counted from 0."""
        line = min(steps, (step // self._every + 1) * self._every)  # after how many steps the next line is due
        self.phases.on = line - step <= MEASURED
        self._steps += self.phases.on

    def add(self, rows: int, dearest: float) -> None:
        """A micro batch of so many rows, padded to the one that costs most (jobs.data.packing.attention_cost), is this rank's."""
        self._cost += rows * dearest * self.phases.on

    def end(self, chosen: NDArray[np.int64], seconds: float) -> dict[str, float]:
        """After a step: its real tokens, without padding, and on known GPUs the share of their peak that its FLOPs take."""
        self.phases.on = False  # an evaluation may come before the next step
        tokens, trained = (int(values[chosen].sum()) for values in (self._rows.lengths, self._rows.counts))
        each = tokens / seconds / self._world.size
        found = {"tokens_per_s": round(each * self._world.size, 1), "tokens_per_s_per_rank": round(each, 1)}
        if self._peak:
            flops = self._work.flops(tokens, trained, float(self._squares[chosen].sum()))
            found["mfu"] = round(flops / seconds / self._world.size / self._peak, 4)
        return found

    def gathered(self) -> tuple[dict[str, float], list[str]]:
        """What all ranks measured since the last call, and warnings: all ranks call this together, once a step is done.

        Seconds of a phase are those of one step, the mean over ranks and steps. Bytes are the peak since the rank started.
        """
        mine = self.phases.read()
        row = [*mine.values(), self._cost, float(peak_bytes(self._world.device))]
        steps, self._cost, self._steps = max(1, self._steps), 0.0, 0
        sent = torch.tensor(row, dtype=torch.float64, device=self._world.device)
        every = [torch.empty_like(sent) for _ in range(self._world.size)]
        dist.all_gather(every, sent)
        table = np.array([one.tolist() for one in every])
        *phases, blocks, cost, memory = table.T
        found = {
            f"{name}_s": round(float(values.mean()) / steps, 5) for name, values in zip(NAMES, phases, strict=True)
        }
        found |= stragglers.summary("memory_gib", memory / stragglers.GIB)
        return found, self._spread.warnings(memory, blocks + phases[0], cost)


def work(model: nn.Module, config: Config) -> Work:
    """What a model, whole and with its adapters, costs to train; it may be without weights."""
    inside, frozen = unwrap.causal_lm(model), config.adapter.kind is not AdapterKind.none
    of = inside.config.get_text_config()
    chosen = getattr(of, "num_experts_per_tok", None) or 1
    embedding, last = inside.get_input_embeddings().weight, inside.get_output_embeddings()
    while hasattr(last, "base_layer"):  # an adapter's
        last = last.base_layer
    outside = {id(embedding), id(last.weight) if last is not None else 0}
    total = 0
    for module in inside.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in outside or (frozen and parameter.requires_grad):
                continue
            outside.add(id(parameter))
            if parameter is getattr(module, "weight", None) and isinstance(module, nn.Linear):
                total += module.in_features * module.out_features  # a packed weight has fewer numbers
            else:  # experts are stored as one: (experts, ., .)
                total += int(parameter.numel() * (chosen / parameter.shape[0] if parameter.dim() == 3 else 1))
    width = of.num_attention_heads * (getattr(of, "head_dim", None) or of.hidden_size // of.num_attention_heads)
    return Work(total, last.weight.numel() if last is not None else 0, of.num_hidden_layers, width, frozen)


def peak_bytes(device: torch.device) -> int:
    """The most that torch's tensors took on a GPU so far; on CPUs the most resident memory of this process.

    From /proc, because getrusage would count what the parent had before it started this one. 0 where there is no /proc.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM:")), 0)


def words(values: dict[str, Any], on_gpu: bool) -> dict[str, str]:
    """The measured part of a line of the log."""
    found = {"tokens/s": f"{values['tokens_per_s']:,.0f}"}
    if on_gpu:
        found["a GPU"] = f"{values['tokens_per_s_per_rank']:,.0f}"
    if "mfu" in values:
        found["MFU"] = f"{values['mfu']:.1%}"
    timed = {name: values[f"{name}_s"] for name in NAMES}
    whole = math.fsum(timed.values()) or 1.0
    found["took"] = f"{values['seconds']:.2f} s (" + ", ".join(f"{n} {s / whole:.0%}" for n, s in timed.items()) + ")"
    low, high = values["memory_gib_min"], values["memory_gib_max"]
    found["GiB"] = f"{high:.1f}" if high - low < 0.05 else f"{low:.1f} to {high:.1f}"
    return found


def _peak(config: Config, world: World) -> float | None:
    """Of bf16 on this rank's GPU: other precisions have other peaks, CPUs none that is known."""
    if world.device.type != "cuda" or config.train.precision is not Precision.bf16:
        return None
    return peak(torch.cuda.get_device_name(world.device))
