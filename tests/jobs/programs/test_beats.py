"""jobs/programs/supervise.py: the beats of a program are read while its ranks write them."""

import threading
from pathlib import Path

import pytest

from jobs.programs.supervise import newest_beat
from muster import beat


def test_the_newest_beat_is_read_while_ranks_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSTER_BEATS", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    assert newest_beat(tmp_path) == (0, "")
    writer = threading.Thread(target=lambda: [beat(step) for step in range(3000)])
    writer.start()
    while writer.is_alive():
        newest_beat(tmp_path)
    writer.join()
    (tmp_path / "2.new").write_text("half")
    assert newest_beat(tmp_path)[1] == "train 2999"
