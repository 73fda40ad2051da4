"""What the tests of jobs share: log lines go to standard output, bare, where capsys finds them."""

import pytest

from jobs.distributed import logs


@pytest.fixture(autouse=True)
def bare_log_lines() -> None:
    logs.set_up()
