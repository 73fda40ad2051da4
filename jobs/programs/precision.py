"""Settles `train.precision=auto` for a program of the user by the GPUs of the first task's node. Needs no torch."""

import logging
import time

from conf import precision
from conf.choices import Precision
from conf.errors import Problem, SiteError
from conf.files import write_json
from conf.schema import Config
from jobs.programs.nvidia_driver import lowest_capability

log = logging.getLogger(__name__)

POLL_S = 0.5


def settle(config: Config, task: int) -> Precision:
    """Return the precision of the run. All tasks call this: the first decides and records it, the others wait for its record.

    A driver that does not answer counts as one of GPUs with bf16. Raises SiteError if the GPUs of this node lack the precision,
    or if there is no record within `cluster.network.nccl_timeout_s`.
    """
    capability = lowest_capability()
    if task == 0 and precision.recorded(config) is None:
        kind = Precision.bf16 if precision.has(capability, Precision.bf16.name) else Precision.fp16
        write_json(precision.record(config), {"precision": kind.name, "devices": _name(capability)})
    settled = _wait_for_record(config)
    if not precision.has(capability, settled.name):
        message = f"became {settled.name} in this run, but the GPUs of this node have {_name(capability)}"
        raise SiteError(
            Problem("train.precision", "auto", f"{message}. Use nodes of one kind, or train.precision=fp16")
        )
    log.info(f"precision {settled.name}: {_name(capability)}")
    return settled


def _wait_for_record(config: Config) -> Precision:
    deadline = time.monotonic() + config.cluster.network.nccl_timeout_s
    while (found := precision.recorded(config)) is None:
        if time.monotonic() > deadline:
            raise SiteError(
                Problem("train.precision", "auto", f"{precision.record(config)} was not written by the first node")
            )
        time.sleep(POLL_S)
    return found


def _name(capability: tuple[int, int] | None) -> str:
    return f"compute capability {capability[0]}.{capability[1]}" if capability else "the driver does not say which GPUs"
