"""Refuses number formats and attention kernels that the GPUs of the site do not have, or that need a GPU; pure."""

import re
from collections.abc import Iterator

from conf.choices import Attention, Float8, Frozen, Precision
from conf.errors import Problem
from conf.precision import LOWEST_CAPABILITY
from conf.schema import Config
from conf.schema_cluster import Resources

CAPABILITIES = {
    r"p100l?|p40|p4|k80|k40|m40|m60|gtx.*|titan_?xp?|1080.*|pascal": (6, 0),
    r"v100[sl]?|titan_?v|volta": (7, 0),
    r"t4|rtx_?[5-8]000|titan_?rtx|rtx_?2\d{3}.*|2080.*|turing": (7, 5),
    r"a100.*|a800.*|a30x?": (8, 0),
    r"a40|a16|a10g?|a2|a6000|rtx_?a\d000|rtx_?30\d\d.*|30[6-9]0.*|ampere": (8, 6),
}
"""Names that sites give to GPUs of a generation -> its compute capability. Other GPUs are not judged here, but by preflight."""
EVERYWHERE = (Attention.auto, Attention.sdpa, Attention.eager, Attention.varlen)
"""Attention kernels that also run on CPUs, and in fp32."""


def problems(config: Config) -> Iterator[Problem]:
    """What training cannot compute on the GPUs of `cluster.train`, or without one."""
    if "train" not in config.jobs:
        return
    yield from _attention(config)
    if config.cluster.train.gpus_per_node:
        yield from _formats(config)


def _attention(config: Config) -> Iterator[Problem]:
    kernel = config.model.attention
    if kernel in EVERYWHERE or (kernel is Attention.cudnn and config.data.packing):  # the second is refused anyway
        return
    if config.cluster.train.gpus_per_node == 0:
        message = "runs on GPUs only, but cluster.train.gpus_per_node=0. Use model.attention=auto"
        yield Problem("model.attention", kernel.name, message)
    elif config.train.precision is Precision.fp32 and kernel is not Attention.flex:
        message = "computes in 16 bits only, but train.precision=fp32. Use train.precision=bf16 or model.attention=auto"
        yield Problem("model.attention", kernel.name, message)


def _formats(config: Config) -> Iterator[Problem]:
    """Number formats, by the name that the config has for the GPUs."""
    gpu = _gpu_type(config.cluster.train)
    capability = _capability(gpu)
    train, adapter = config.train, config.adapter
    asked = (
        ("train.precision", train.precision.name, "bf16", train.precision is Precision.bf16, "fp16 or auto"),
        ("train.tf32", True, "tf32", train.tf32, "false"),
        ("train.float8", train.float8.name, "float8", train.float8 is not Float8.none, "none"),
        ("adapter.base", adapter.base.name, "float8", adapter.base is Frozen.float8, "int8 or full"),
    )
    for key, value, format, is_asked, instead in asked:
        if is_asked and capability and capability < LOWEST_CAPABILITY[format]:
            needed = ".".join(map(str, LOWEST_CAPABILITY[format]))
            message = f"the GPUs of cluster.train ({gpu}) have no {format}, which needs compute capability {needed}. "
            yield Problem(key, value, f"{message}Set {key}={instead}, or use newer GPUs")


def _gpu_type(part: Resources) -> str:
    """The type in `gpu_type`, or in `sbatch: {gres: gpu:TYPE:8}`; empty if there is none."""
    options = (str(part.sbatch.get(name) or "") for name in ("gres", "gpus-per-node", "gpus"))
    found = (re.match(r"(?:gpu:)?([A-Za-z][\w-]*)", option) for option in options)
    return part.gpu_type or next((match[1] for match in found if match), "")


def _capability(gpu: str) -> tuple[int, int] | None:
    """The compute capability of a GPU named such as `V100`, `nvidia_a100-sxm4-80gb` or `tesla_t4`; None if it is not known."""
    name = re.sub(r"^((nvidia|tesla|geforce|quadro)_)+", "", re.sub(r"[- ]", "_", gpu.lower()))
    fitting = (capability for names, capability in CAPABILITIES.items() if re.fullmatch(rf"({names})(_.*)?", name))
    return None if "ada" in name.split("_") else next(fitting, None)
