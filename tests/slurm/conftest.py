"""The fixtures `slurm`, one real Slurm cluster for the whole test session, and `whole` and `start`: a training to interrupt.

test_cluster.py and test_accounting.py start and stop clusters of their own, and a machine has room for one. So their tests
run before all others, when this fixture has started nothing yet, and they are skipped where a cluster is up already.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import runs
from .cluster import Cluster, available, running, up

WORDS = [
    "cluster.train.ranks_per_node=1", "train.global_batch=8", "train.micro_batch=2", "train.steps=40",
    "train.learning_rate=3e-3", "train.precision=fp32", "train.fingerprint=true", "train.eval_every=10", "data.max_rows=120",
    "train.save_every=0",
]  # fmt: skip
"""A training small enough for seconds, with an evaluation every few steps: what is stopped in one is made up for."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = [Path(__file__).with_name(name) for name in ("test_cluster.py", "test_accounting.py")]
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """The cluster, with SLURM_CONF set. One that is up already is used as it is and left up.

    MUSTER_TEST_ACCOUNTING=1 starts it with a database, so that sacct works; without, sacct fails.
    """
    accounting = os.environ.get("MUSTER_TEST_ACCOUNTING") == "1"
    found = running()
    if found is None and (reason := available(accounting)):
        pytest.skip(reason)
    cluster = found or up(accounting=accounting)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(cluster.conf))
            yield cluster
    finally:
        if found is None:
            cluster.down()


@pytest.fixture(scope="session")
def whole(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    runs.complete(run, *WORDS, "jobs=[preprocess,train]")
    return run


@pytest.fixture
def start(whole: Path, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`start("jobs=[train]", ...)` starts a run on the rows of `whole`; it is cancelled in the end."""
    run = tmp_path / "run"

    def begin(*words: str) -> Path:
        runs.start(run, *WORDS, "jobs=[train]", *words)
        shutil.copytree(
            whole / "data", run / "data"
        )  # while the ranks still import torch: launch.py wants a new folder
        return run

    yield begin
    runs.command("cancel", run)
