"""Accelerate's and the Trainer's programs train as the config says, in every layout, and stop and go on."""

import shutil
from pathlib import Path

import pytest

from tests.jobs.own_programs import __main__ as own
from tests.jobs.own_programs import plain

pytestmark = [pytest.mark.proof, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("own")
    plain.make_model(folder / "tiny")
    shutil.copytree(own.ROOT / "examples/tokenizer", folder / "tiny", dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("case", own.CASES, ids=lambda case: case.name)
def test_a_program_gets_its_layout_and_trains_like_one_process(folder: Path, case: own.Case) -> None:
    result = own.check(case, folder, gpu=False, timeout_s=400)
    assert result.startswith("ok "), result
