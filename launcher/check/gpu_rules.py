"""Refuses number formats and attention kernels that the GPUs of the site do not have, or that need a GPU; pure."""

import re
from collections.abc import Iterator

from conf.choices import Attention, Float8, Frozen, Precision
from conf.errors import Problem
from conf.schema import Config

BEFORE_AMPERE = (
    r"v100s?|p100|p40|p4|t4|k80|k40|m40|m60|gtx.*|titan.*|rtx_?2\d{3}.*|2080.*|1080.*|quadro.*|volta|turing|pascal"
)
"""GPUs without bfloat16: compute capability below 8.0."""
AMPERE = r"a100.*|a800.*|a40|a30x?|a16|a10g?|a2|a6000|rtx_?a\d000|rtx_?30\d\d.*|30[6-9]0.*|ampere"
"""GPUs without 8-bit floating point: compute capability below 8.9."""


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
    if kernel in EVERYWHERE:
        return
    if config.cluster.train.gpus_per_node == 0:
        message = "runs on GPUs only, but cluster.train.gpus_per_node=0. Use model.attention=auto"
        yield Problem("model.attention", kernel.name, message)
    elif config.train.precision is Precision.fp32 and kernel is not Attention.flex:
        message = "computes in 16 bits only, but train.precision=fp32. Use train.precision=bf16 or model.attention=auto"
        yield Problem("model.attention", kernel.name, message)


def _formats(config: Config) -> Iterator[Problem]:
    """Number formats, by the GPUs that `cluster.train.gpu_type` names, or `sbatch: {gres: gpu:TYPE:8}`."""
    part = config.cluster.train
    gres = re.search(r"gpu:([A-Za-z]\w*)", str(part.sbatch.get("gres") or part.sbatch.get("gpus-per-node") or ""))
    gpu = part.gpu_type or (gres[1] if gres else "")
    name = re.sub(r"^(nvidia|tesla|geforce)[_-]", "", gpu.lower()).replace("-", "_")
    old, ampere = (
        re.fullmatch(rf"(nvidia_|tesla_|geforce_)?({known})(_.*)?", name) for known in (BEFORE_AMPERE, AMPERE)
    )
    where = f"the GPUs of cluster.train ({gpu}) do not have"
    if old and config.train.precision is Precision.bf16:
        yield Problem("train.precision", "bf16", f"{where} bfloat16. Use train.precision=fp16")
    if (old or ampere) and config.train.float8 is not Float8.none:
        yield Problem("train.float8", config.train.float8.name, f"{where} float8. Use train.float8=none")
    if (old or ampere) and config.adapter.base is Frozen.float8:
        yield Problem("adapter.base", "float8", f"{where} float8. Use adapter=qlora8 or adapter=lora")
