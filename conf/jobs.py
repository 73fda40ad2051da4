"""The one table of job kinds: what each reads, which resources it gets, whether its ranks communicate, whether it can resume.

launcher/plan.py orders and sizes jobs by it. launcher/run_folder and launcher/supervise read from it what an attempt should
leave behind. jobs/__init__.py looks up the names of jobs in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class JobKind:
    """One kind of job."""

    after: tuple[str, ...]
    """Kinds whose results this one reads. It starts after the ones that the run has."""
    section: str
    """The section of `cluster` with its resources: `train`, `cpu` or `inference`."""
    distributed: bool = False
    """Whether its ranks form a process group, so that they need a rendezvous."""
    single_rank: bool = False
    """Whether it runs as one process even if its section of `cluster` has more ranks."""
    resumable: bool = False
    """Whether it saves checkpoints. An attempt without a new checkpoint then made no progress."""
    needs_hub: bool = False
    """Whether it is there to exchange files with the Hub, so that `cluster.offline` does not hold for it."""


JOB_KINDS: Mapping[str, JobKind] = MappingProxyType(
    {
        "fetch": JobKind(after=(), section="cpu", single_rank=True, needs_hub=True),
        "preflight": JobKind(after=(), section="train", distributed=True),
        "preprocess": JobKind(after=("fetch",), section="cpu", single_rank=True),
        "train": JobKind(after=("fetch", "preflight", "preprocess"), section="train", distributed=True, resumable=True),
        "custom": JobKind(after=("fetch", "preflight"), section="train", distributed=True, resumable=True),
        "consolidate": JobKind(after=("train", "custom"), section="cpu"),
        "evaluate": JobKind(after=("preprocess", "consolidate"), section="inference"),
        "generate": JobKind(after=("consolidate",), section="inference"),
        "push": JobKind(after=("consolidate",), section="cpu", single_rank=True, needs_hub=True),
    }
)
"""Every kind by its name, in the order in which jobs are submitted."""

RESUMABLE = frozenset(name for name, kind in JOB_KINDS.items() if kind.resumable)
"""Names of the kinds that save checkpoints."""

AFTER_TRAINING = frozenset(("consolidate", "evaluate", "generate", "push"))
"""Names of the kinds that read what training has made."""
BEFORE_TRAINING = frozenset(JOB_KINDS) - AFTER_TRAINING - RESUMABLE
"""Names of the kinds that come before training. The runs of a sweep with the same data and model share them."""
