"""Logs a line once per process, on rank 0 only: models are built, and files are listed, more than once."""

import logging
from functools import cache

import torch.distributed as dist

log = logging.getLogger(__name__)


@cache
def log_once(line: str) -> None:
    """Log `line` if this process has not logged it before."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.info(line)
