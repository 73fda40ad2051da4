"""launcher/run_folder/names.py: launches in the same second have folders of their own."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra

from conf import resolve
from launcher.run_folder import names
from tests.conftest import ROOT


def test_a_folder_is_named_by_the_command_line_or_an_experiment(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nname: mine\nrun_dir: out\n")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        unnamed, typed = (hydra.compose("config", [word]) for word in ("name=mine", "run_dir=out"))
        own = hydra.compose("config", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert [names.is_named(config) for config in (unnamed, typed, own)] == [False, True, True]
    assert (own.name, own.run_dir) == ("mine", "out")


def test_many_launches_at_once_share_no_folder(tmp_path: Path) -> None:
    run = str(tmp_path / "runs/tiny-1")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: names.reserve(run), range(40)))
    assert sorted(made) == sorted([run, *(f"{run}-{number}" for number in range(2, 41))])
    assert names.free(run) == f"{run}-41"


def test_launches_in_the_same_second_are_different_runs(tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "launch.py", "cluster=slurm", "submit=script", "name=sweep"]
    started = [
        subprocess.Popen(
            [*words, f"train.seed={seed}"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        for seed in range(4)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, errors
    seeds = {resolve.load(path).train.seed for path in tmp_path.glob("runs/sweep-*/config.yaml")}
    assert seeds == {0, 1, 2, 3}
