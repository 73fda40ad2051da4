"""launcher/submit/follow_log.py: how long the other ranks of a job may continue after one has ended."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.run_folder.status import COMPLETED, FAILED
from launcher.submit import follow_log
from launcher.submit.display import Plain
from launcher.submit.interrupts import Interrupts
from launcher.supervise import attempt


@pytest.mark.parametrize(("status", "goes_on"), [(COMPLETED, True), (FAILED, False)])
def test_only_a_rank_that_has_failed_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, goes_on: bool
) -> None:
    monkeypatch.setattr(follow_log, "GRACE_S", -1)
    (tmp_path / "attempt-1").mkdir()
    attempt.record_end(tmp_path, 1, 0, status)
    started = SimpleNamespace(paths=SimpleNamespace(stdout=tmp_path / "log"), done=lambda: False)
    log = follow_log.Log(started, tmp_path / "attempt-1", Plain(Interrupts()))
    assert log.show_more() is goes_on
