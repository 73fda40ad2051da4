"""The wheel, in a fresh environment outside the clone: the same command, data files and results; nobody's `conf` is in its way."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from muster import __version__
from tests.conftest import ROOT

Muster = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with Muster's wheel; its dependencies are those of this Python."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    assert built.returncode == 0, built.stderr
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv/bin/python"
    [wheel] = folder.glob("muster-*.whl")
    done = run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    [packages] = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "venv/bin"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own project, with a conf/ package, a launcher.py and a jobs.py."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "conf").mkdir()
    for name in ("conf/__init__.py", "launcher.py", "jobs.py", "launch.py"):
        (folder / name).write_text("raise SystemExit('this is the user’s own module')\n")
    return folder


@pytest.fixture(scope="module")
def muster(installed: Path, project: Path) -> Muster:
    return lambda *words: run(installed / "muster", *words, cwd=project)


def test_the_wheel_adds_one_name_to_the_environment(installed: Path) -> None:
    [packages] = (installed.parent / "lib").glob("python*/site-packages")
    names = {path.name for path in packages.iterdir() if not path.name.endswith((".dist-info", ".pth"))}
    assert names - {"__pycache__"} == {"muster"}
    bundle = packages / "muster/_bundle"
    for pattern in ("conf/*/*.yaml", "slurm_templates/*.j2", "pages/templates/*", "examples/*.jsonl"):
        assert {path.relative_to(bundle) for path in bundle.glob(pattern)} == {
            path.relative_to(ROOT) for path in ROOT.glob(pattern)
        }


def test_the_version_names_the_commit(muster: Muster) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = muster("--version").stdout
    assert shown.startswith(f"muster {__version__} (commit {commit.strip()}")


def test_a_dry_run_prints_what_the_clone_prints(muster: Muster, installed: Path, project: Path) -> None:
    words = [
        "cluster=slurm",
        "model=llama70b",
        "parallel=zero3",
        "dry_run=true",
        "run_dir=/runs/x",
        "cluster.python=/p",
    ]
    words += [
        f"generate.prompts={ROOT}/examples/prompts.jsonl",
        "data=jsonl",
        f"data.path={ROOT}/examples/sample.jsonl",
        f"model.tokenizer={ROOT}/examples/tokenizer",
    ]
    wheel, clone = muster("run", *words), run(sys.executable, ROOT / "launch.py", *words, cwd=project)
    assert (wheel.returncode, wheel.stderr) == (0, "")
    assert "#SBATCH --nodes=4" in wheel.stdout
    assert wheel.stdout == clone.stdout


def test_a_run_is_launched_looked_at_resumed_and_merged(muster: Muster, project: Path) -> None:
    small = ["train.steps=2", "train.warmup_steps=0", "train.global_batch=8", "train.eval_every=0"]
    done = muster("run", "run_dir=runs/small", "pipeline=train", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = muster("status", "runs/small")
    assert shown.returncode == 0
    assert "completed" in shown.stdout
    again = muster("resume", "runs/small", "train.steps=3")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from" in again.stdout
    merged = muster("merge", "runs/small")
    assert merged.returncode == 0, merged.stdout + merged.stderr
    assert (project / "runs/small/model/model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ([], 2, "usage: muster"),
        (["--help"], 0, "muster run --help"),
        (["status", "--help"], 0, "usage: muster status"),
        (["model=tiny"], 2, "to launch a run: muster run model=tiny"),
        (["status", "runs/none"], 2, "muster: RUN=runs/none"),
        (["run", "modle=tiny"], 2, "muster run: modle"),
    ],
)
def test_a_command_that_cannot_run_says_what_to_type(muster: Muster, words: list[str], code: int, shown: str) -> None:
    done = muster(*words)
    assert done.returncode == code
    assert shown.split("RUN=runs")[0] in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
