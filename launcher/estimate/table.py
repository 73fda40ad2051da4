"""Holds an estimate of memory, part by part in bytes, and formats it as one line or as a table; pure."""

from dataclasses import astuple, dataclass, fields

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Bytes of one GPU (on CPUs: of one rank) at the peak of a training step."""

    parameters: float
    """Kept between steps: fp32 master weights, bf16 copies, the frozen base under an adapter."""
    gathered: float
    """Whole parameters, gathered for compute."""
    gradients: float
    """Gradients of the rank's shards, minus the memory that they take over from freed activations."""
    optimizer: float
    activations: float
    """Saved for backward, plus what one block adds while it is recomputed and differentiated."""
    logits: float
    """Logits of the output head with their copies in cross entropy."""
    communication: float
    """Buffers for gradient reduction."""
    context: float
    """Outside torch's allocator: CUDA context and NCCL."""
    slack: float
    """Fragmentation of torch's caching allocator."""
    loading: float
    """A separate peak before the first step, if the whole model is on the GPU before it is sharded. Not part of `step`."""

    @property
    def total(self) -> float:
        return max(self.step, self.loading + self.context)

    @property
    def step(self) -> float:
        """Bytes of a training step: the sum of all parts except `loading`."""
        return float(sum(astuple(self)[:-1]))


@dataclass(frozen=True)
class Host:
    """Bytes of host memory of one node."""

    loading: float
    """Weights while they are loaded; freed before training."""
    offload: float
    """Sharded state that is kept in host memory, with its pinned buffers."""
    processes: float

    @property
    def total(self) -> float:
        return max(self.loading, self.offload) + self.processes


@dataclass(frozen=True)
class Disk:
    """Bytes in the run folder on the shared file system."""

    checkpoint: float
    """One checkpoint: fp32 weights and optimizer state of what is trained."""
    checkpoints: float
    """All checkpoints that are kept, plus the one being written."""
    merged: float
    """RUN/model, the consolidated model."""

    @property
    def total(self) -> float:
        return self.checkpoints + self.merged


@dataclass(frozen=True)
class Estimate:
    """What the train job is estimated to take."""

    device: Device
    host: Host
    disk: Disk
    on_gpu: bool


def line(estimate: Estimate, capacity_gib: float | None = None) -> str:
    """The estimate in one line. `capacity_gib` is the memory of one GPU in GiB, if known."""
    host, disk = gib(estimate.host.total), gib(estimate.disk.checkpoint)
    return f"{device_line(estimate, capacity_gib)}, {host} GiB of host memory per node, checkpoint {disk} GiB on disk"


def device_line(estimate: Estimate, capacity_gib: float | None = None) -> str:
    """The part of one GPU in one line. Parts that round to 0.0 GiB are left out."""
    device = estimate.device
    parts = {item.name: gib(getattr(device, item.name)) for item in fields(device) if item.name != "loading"}
    shown = ", ".join(f"{name} {size}" for name, size in parts.items() if size != "0.0")
    if device.total > device.step:
        shown = "while loading"
    of = "" if capacity_gib is None else f" of {capacity_gib:g}"
    unit = "GPU" if estimate.on_gpu else "rank"
    return f"{gib(device.total)}{of} GiB per {unit}" + (f" ({shown})" if shown else "")


def table(estimate: Estimate) -> list[str]:
    """The estimate as aligned lines, one for each part that is not zero."""
    rows: list[tuple[str, float]] = []
    sections: tuple[tuple[str, Device | Host | Disk], ...] = (
        ("GPU" if estimate.on_gpu else "rank", estimate.device),
        ("host", estimate.host),
        ("disk", estimate.disk),
    )
    for title, section in sections:
        rows += [(f"{title} {item.name}", getattr(section, item.name)) for item in fields(section)]
        rows.append((f"{title} total", section.total))
    return [f"{label:<22}{gib(size):>10} GiB" for label, size in rows if size]


def gib(size: float) -> str:
    """Bytes as GiB with one decimal, without the unit."""
    return f"{size / GIB:.1f}"
