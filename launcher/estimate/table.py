"""What an estimate of memory says, part by part in bytes, and how it is shown: in a line or as a table; pure."""

from dataclasses import astuple, dataclass, fields
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Bytes of one GPU (on CPUs: of one rank) at the peak of a training step."""

    parameters: float
    """Kept between steps: fp32 masters, bf16 copies, a frozen base."""
    gathered: float
    """Whole parameters that are gathered for compute."""
    gradients: float
    """Of the shards, as far as they do not take the place of activations."""
    optimizer: float
    activations: float
    """Kept for backward, and what one block adds while it is recomputed and differentiated."""
    logits: float
    """Of the output head, with their copies in cross entropy."""
    communication: float
    """Buffers of reduction."""
    context: float
    slack: float
    loading: float
    """Another peak, before the first step, where the model goes to the GPU before it is sharded; not part of the sum."""

    @property
    def total(self) -> float:
        return max(self.step, self.loading + self.context)

    @property
    def step(self) -> float:
        """Of a training step: the sum of the parts."""
        return float(sum(astuple(self)[:-1]))


@dataclass(frozen=True)
class Host:
    """Bytes of one node's host memory."""

    loading: float
    """Weights while they are loaded; freed before training."""
    offload: float
    """Sharded state that is kept here, pinned where it is copied from."""
    processes: float

    @property
    def total(self) -> float:
        return max(self.loading, self.offload) + self.processes


@dataclass(frozen=True)
class Disk:
    """Bytes below RUN on the shared file system."""

    checkpoint: float
    """One checkpoint: fp32 weights and both moments of what is trained."""
    checkpoints: float
    """As many as are kept, and the one that is being written."""
    merged: float
    """RUN/model."""

    @property
    def total(self) -> float:
        return self.checkpoints + self.merged


@dataclass(frozen=True)
class Estimate:
    device: Device
    host: Host
    disk: Disk
    on_gpu: bool


def line(found: Estimate, capacity_gib: float | None = None) -> str:
    """The estimate in one line."""
    host, disk = gib(found.host.total), gib(found.disk.checkpoint)
    return f"{device_line(found, capacity_gib)}, {host} GiB a host, checkpoint {disk} GiB on disk"


def device_line(found: Estimate, capacity_gib: float | None = None) -> str:
    """A GPU's part of it; what rounds to nothing is left out."""
    device = found.device
    parts = {item.name: gib(getattr(device, item.name)) for item in fields(device) if item.name != "loading"}
    shown = ", ".join(f"{name} {size}" for name, size in parts.items() if size != "0.0")
    if device.total > device.step:
        shown = "while loading"
    of = "" if capacity_gib is None else f" of {capacity_gib:g}"
    return f"{gib(device.total)}{of} GiB a {'GPU' if found.on_gpu else 'rank'}" + (f" ({shown})" if shown else "")


def table(found: Estimate) -> list[str]:
    """The estimate as aligned lines: what, GiB. What is nothing is left out."""
    rows: list[tuple[str, Any]] = []
    for title, section in (
        ("GPU" if found.on_gpu else "rank", found.device),
        ("host", found.host),
        ("disk", found.disk),
    ):
        rows += [(f"{title} {item.name}", getattr(section, item.name)) for item in fields(section)]
        rows.append((f"{title} total", section.total))
    return [f"{what:<22}{gib(size):>10} GiB" for what, size in rows if size]


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"
