"""Chooses the compute precision of `train.precision=auto` from the GPUs of all ranks, and refuses one that they lack."""

import logging
import socket
from dataclasses import dataclass

import torch

from conf import precision
from conf.choices import Precision
from conf.errors import Problem, SiteError
from conf.files import write_json
from conf.precision import LOWEST_CAPABILITY
from conf.schema import Config
from jobs.distributed.collectives import broadcast_from_rank0, gather
from jobs.distributed.process_group import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """The device of one rank."""

    host: str
    name: str = "cpu"
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None for a CPU or a GPU of another kind, which compute in every precision."""

    def has(self, kind: str) -> bool:
        return precision.has(self.capability, kind)


def settle(config: Config, world: World) -> None:
    """Replace `train.precision=auto` in `config` by what the GPUs of all ranks have, and log which it is. All ranks call this.

    Raises SiteError if a GPU lacks the precision that the config or an earlier attempt has chosen, or TF32 if `train.tf32` asks
    for it. Sets torch's precision of fp32 matrix products to TF32 if so.
    """
    devices = gather(lambda: this_device(world))
    train, earlier = config.train, None
    if train.precision is Precision.auto:
        earlier = broadcast_from_rank0(lambda: precision.recorded(config))
        train.precision = earlier or choose(devices)
        names = ", ".join(sorted({device.name for device in devices}))
        log.info(f"precision {train.precision.name}: {'as this run began' if earlier else names}")
        if world.is_main and not earlier:
            write_json(precision.record(config), {"precision": train.precision.name, "devices": names})
    if problems := lacking(config, devices, begun=earlier is not None):
        raise SiteError(*problems)
    if train.tf32:
        allow_tf32()


def choose(devices: list[Device]) -> Precision:
    """bf16 if the GPUs of all ranks have it, else fp16 likewise; fp32 on CPUs."""
    kinds = () if any(device.name == "cpu" for device in devices) else (Precision.bf16, Precision.fp16)
    return next((kind for kind in kinds if all(device.has(kind.name) for device in devices)), Precision.fp32)


def lacking(config: Config, devices: list[Device], begun: bool = False) -> list[Problem]:
    """A problem for each precision that the config asks for and a device lacks. `begun`: the run cannot change its precision."""
    wanted = {"train.precision": config.train.precision.name} | ({"train.tf32": "tf32"} if config.train.tf32 else {})
    problems = []
    for key, kind in wanted.items():
        without = [device for device in devices if not device.has(kind)]
        if not without:
            continue
        other = "fp16" if kind == "bf16" and all(device.has("fp16") for device in without) else "fp32"
        remedy = "set train.tf32=false, or " if kind == "tf32" else "" if begun else f"set train.precision={other}, or "
        hosts = ", ".join(sorted({device.host for device in without}))
        major, minor = without[0].capability or (0, 0)
        message = f"{without[0].name} (compute capability {major}.{minor}, on {hosts}) has no {kind}: {remedy}use "
        message += f"GPUs of capability {'.'.join(map(str, LOWEST_CAPABILITY[kind]))} or higher"
        problems.append(Problem(key, True if kind == "tf32" else kind, message))
    return problems


def this_device(world: World) -> Device:
    """The device of this rank."""
    host = socket.gethostname()
    if world.device.type != "cuda":
        return Device(host)
    capability = None if torch.version.hip else torch.cuda.get_device_capability(world.device)
    return Device(host, torch.cuda.get_device_name(world.device), capability)


def allow_tf32() -> None:
    """Let matrix products and convolutions of fp32 numbers round their factors to TF32, which has 10 bits of mantissa."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
