"""The one table of job kinds: what each reads, which resources it gets, whether its ranks talk, whether it can continue.

launcher/plan.py orders and sizes jobs by it, launcher/run_folder and launcher/supervise ask it what an attempt should leave,
jobs/__init__.py looks names up in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class JobKind:
    """One kind of job."""

    after: tuple[str, ...]
    """Jobs whose results this one reads; it starts after those of them that the run has."""
    section: str
    """The section of `cluster` with its resources: `train`, `cpu` or `inference`."""
    distributed: bool = False
    """Whether its ranks form a process group: they then need a rendezvous."""
    single_rank: bool = False
    """Whether it is one process even where its section of `cluster` has more ranks."""
    resumable: bool = False
    """Whether it saves checkpoints, so that an attempt without a new one made no progress."""


JOB_KINDS: Mapping[str, JobKind] = MappingProxyType(
    {
        "preflight": JobKind(after=(), section="train", distributed=True),
        "preprocess": JobKind(after=(), section="cpu", single_rank=True),
        "train": JobKind(after=("preflight", "preprocess"), section="train", distributed=True, resumable=True),
        "consolidate": JobKind(after=("train",), section="cpu"),
        "evaluate": JobKind(after=("preprocess", "consolidate"), section="inference"),
        "generate": JobKind(after=("consolidate",), section="inference"),
    }
)
"""Every kind by its name, in the order in which jobs are submitted."""

RESUMABLE = frozenset(name for name, kind in JOB_KINDS.items() if kind.resumable)
"""Names of the kinds that save checkpoints."""
