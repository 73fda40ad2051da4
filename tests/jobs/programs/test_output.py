"""jobs/programs/output.py: the lines of the ranks that torchrun starts are sorted into their logs."""

import io
from pathlib import Path

from jobs.programs.output import Output


def test_each_rank_gets_its_own_lines(tmp_path: Path) -> None:
    text = b"from torchrun\n[muster-rank-4]:a\n[muster-rank-5]:50%[muster-rank-4]:b\n[muster-rank-5]:c"
    output = Output(io.BytesIO(text), tmp_path, rank=4)
    output.finish()
    assert output.last == {4: ["from torchrun", "a", "b"], 5: ["50%", "c"]}
    assert (tmp_path / "rank-4.log").read_text() == "a\nb\n"
    assert (tmp_path / "rank-5.log").read_text() == "50%\nc\n"
