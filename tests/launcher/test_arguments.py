"""launcher/commands: numbers on the command line that cannot be meant are refused by argparse, in one line."""

import pytest

from launcher import __main__ as muster


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
@pytest.mark.parametrize("command", ["wait", "status"])
def test_every_is_a_number_of_seconds(capsys: pytest.CaptureFixture[str], command: str, seconds: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        muster.main([command, "run", f"--every={seconds}"])
    assert f"'{seconds}' is not a number of seconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize("gpus", ["0", "-8", "1.5", "all"])
def test_an_import_is_for_at_least_one_gpu(capsys: pytest.CaptureFixture[str], gpus: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        muster.main(["import", "their.yaml", f"--gpus={gpus}"])
    assert f"'{gpus}' is not a number of GPUs" in capsys.readouterr().err
