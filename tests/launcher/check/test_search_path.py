"""launcher/check/search_path.py: the folders of a user's own config groups, and that checks and Hydra find what lies there."""

import shutil
from pathlib import Path

import pytest

from conf.errors import ConfigError
from launcher.check import search_path
from tests.conftest import ROOT, Launch


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir", "{folder}"],
        ["--config-dir={folder}"],
        ["-cd", "{folder}"],
        ["hydra.searchpath=['file://{folder}']"],
        ["hydra.searchpath=[file://{folder}]"],
    ],
    ids=" ".join,
)
def test_a_folder_is_found_however_it_is_given(home: Path, tmp_path: Path, words: list[str]) -> None:
    kept, folders = search_path.read(["model=tiny", *(word.format(folder=tmp_path) for word in words)])
    assert kept == ["model=tiny", f'hydra.searchpath=["file://{tmp_path}"]']
    assert folders == [tmp_path]


def test_the_users_own_folder_comes_last(home: Path, tmp_path: Path) -> None:
    assert search_path.read(["model=tiny"]) == (["model=tiny"], [])
    (home / ".config/muster/conf").mkdir(parents=True)
    (tmp_path / "a b").mkdir()
    _, folders = search_path.read(["--config-dir", str(tmp_path / "a b")])
    assert folders == [tmp_path / "a b", home / ".config/muster/conf"]


@pytest.mark.parametrize(
    "word",
    [
        "--config-dir=/nowhere",
        "--config-dir",
        "-cd",
        "--config-dir=",
        "hydra.searchpath=[file:///nowhere]",
        "hydra.searchpath=x",
    ],
)
def test_a_folder_that_does_not_exist_is_refused(home: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=r"no such folder|is not a list of folders"):
        search_path.read([word])


def test_what_lies_there_can_be_chosen(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "home/.config/muster/conf/model").mkdir(parents=True)
    (tmp_path / "my groups/cluster").mkdir(parents=True)
    shutil.copy(ROOT / "conf/model/llama8b.yaml", tmp_path / "home/.config/muster/conf/model/own.yaml")
    shutil.copy(ROOT / "conf/cluster/slurm.yaml", tmp_path / "my groups/cluster/mine.yaml")
    words = ["--config-dir", "my groups", "cluster=mine", "model=own", "dry_run=true"]
    done = launch(*words, env={"HOME": str(tmp_path / "home")})
    assert (done.returncode, done.stderr) == (0, "")
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    done = launch(*words[:2], "cluster=mien", "dry_run=true", env={"HOME": str(tmp_path / "home")})
    assert "cluster=mien: no such option: did you mean 'mine'?" in done.stderr
