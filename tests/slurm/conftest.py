"""The fixture `slurm`: one real Slurm cluster for the whole test session.

test_cluster.py and test_accounting.py start and stop clusters of their own, and a machine has room for one. So their tests
run before all others, when this fixture has started nothing yet, and they are skipped where a cluster is up already.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, available, running, up


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
