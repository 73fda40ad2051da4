"""Fixtures: `slurm`, one real Slurm cluster for the whole session; `whole` and `start`, a small training to interrupt.

test_cluster.py and test_accounting.py start and stop their own clusters, and a machine has room for one. So their tests run
before all others, before the fixture `slurm` has started its cluster. They are skipped if a cluster is already up.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import runs
from .cluster import Cluster, available, running, up

OVERRIDES = [
    "cluster.train.ranks_per_node=1", "train.global_batch=8", "train.micro_batch=2", "train.steps=40",
    "train.learning_rate=3e-3", "train.precision=fp32", "train.fingerprint=true", "train.eval_every=10", "data.max_rows=120",
    "train.save_every=0",
]  # fmt: skip
"""A training that takes seconds. Evaluations are frequent, so that some stops interrupt one, which is then repeated."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = [Path(__file__).with_name(name) for name in ("test_cluster.py", "test_accounting.py")]
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """The cluster, with SLURM_CONF set. A cluster that is already up is used, and left up.

    MUSTER_TEST_ACCOUNTING=1 starts it with a database, so that sacct works. Without a database sacct fails.
    """
    accounting = os.environ.get("MUSTER_TEST_ACCOUNTING") == "1"
    already_up = running()
    if already_up is None and (reason := available(accounting)):
        pytest.skip(reason)
    cluster = already_up or up(accounting=accounting)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(cluster.conf))
            yield cluster
    finally:
        if already_up is None:
            cluster.down()


@pytest.fixture(scope="session")
def whole(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is not interrupted: what the others are compared with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    runs.complete(run, *OVERRIDES, "jobs=[preprocess,train]")
    return run


@pytest.fixture
def start(whole: Path, tmp_path: Path) -> Iterator[runs.Start]:
    """`start("train.save_every=5", ...)` starts the training of `whole` with more overrides."""
    yield from runs.starter(tmp_path / "run", whole / "data", OVERRIDES)
