"""Command lines that must fail at launch, and others that must not: some of them always, all of them with `make wrong-configs`."""

from pathlib import Path

import pytest

from tests.launcher.check import wrong_configs

EVERY = 20
"""One in this many command lines is tried by default."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    wrong_configs.write_files(folder)
    return folder


@pytest.fixture(autouse=True)
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.argv", ["launch.py"])  # launch.main changes it


@pytest.mark.parametrize(("key", "words"), wrong_configs.wrong()[::EVERY])
def test_a_wrong_config_is_refused_with_its_key(files: Path, key: str, words: str) -> None:
    verdict, message = wrong_configs.judge(key, words, files)
    assert verdict == "caught", message


@pytest.mark.parametrize("words", wrong_configs.right()[::EVERY])
def test_a_right_config_is_not_refused(files: Path, words: str) -> None:
    assert wrong_configs.outcome(words, files) == (0, "")


@pytest.mark.proof
@pytest.mark.parametrize(("key", "words"), wrong_configs.wrong())
def test_every_wrong_config_is_refused_with_its_key(files: Path, key: str, words: str) -> None:
    verdict, message = wrong_configs.judge(key, words, files)
    assert verdict == "caught", message


@pytest.mark.proof
@pytest.mark.parametrize("words", wrong_configs.right())
def test_no_right_config_is_refused(files: Path, words: str) -> None:
    assert wrong_configs.outcome(words, files) == (0, "")
