"""Command lines that must fail at launch, and others that must not: some of them always, all of them with `make wrong-configs`."""

from pathlib import Path

import pytest

import launch
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


@pytest.mark.parametrize(
    ("key", "words", "verdict"),
    [
        ("train.seed", "train.seed=7", "let through"),
        ("train.seed", "train.steps=0", "misleading"),
        ("train.steps", "train.steps=0", "caught"),
    ],
)
def test_a_verdict_can_be_bad(files: Path, key: str, words: str, verdict: str) -> None:
    assert wrong_configs.judge(key, words, files)[0] == verdict


def test_the_page_shows_bad_verdicts() -> None:
    judged = [
        ("train.steps", "train.steps=0", "caught", "launch.py: model.x: other\ntrain.steps=0: must be at least 1"),
        ("train.seed", "train.seed=7", "let through", ""),
    ]
    text = wrong_configs.page(judged, refused=1, passed=2)
    assert "| `train.steps` | 1 | `train.steps=0` | train.steps=0: must be at least 1 |" in text
    end = "RESULT wrong=2 caught=1 let_through=1 traceback=0 misleading=0 right=3 passed=2 refused=1"
    assert wrong_configs.result(judged, 1, 2) == end and end in text


def test_overrides_that_are_not_used_are_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama8b", "model=tiny", "train.steps=5", "train.steps=5", "train.steps=6", "dry_run=true"]
    assert launch.main(words) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning ")] == [
        "warning   model=llama8b is not used: model=tiny comes after it",
        "warning   train.steps=5 is not used: train.steps=6 comes after it",
    ]


@pytest.mark.proof
@pytest.mark.parametrize(("key", "words"), wrong_configs.wrong())
def test_every_wrong_config_is_refused_with_its_key(files: Path, key: str, words: str) -> None:
    verdict, message = wrong_configs.judge(key, words, files)
    assert verdict == "caught", message


@pytest.mark.proof
@pytest.mark.parametrize("words", wrong_configs.right())
def test_no_right_config_is_refused(files: Path, words: str) -> None:
    assert wrong_configs.outcome(words, files) == (0, "")
