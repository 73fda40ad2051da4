"""What the login-node tests share: composing a config, running launch.py and small programs that stand for Slurm's."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import cache, partial
from importlib import import_module
from io import StringIO
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore

import launch as launch_program
from conf.resolve import resolve
from conf.schema import Config
from launcher.check import localize
from tests import hub_server
from tests.hub_server import Hub

ROOT = Path(__file__).resolve().parent.parent
RUN_DIR = "/runs/golden"
"""The run folder of every composed config that names none: nothing is written there."""

Compose = Callable[..., Config]
Launch = Callable[..., "subprocess.CompletedProcess[str]"]
Programs = Callable[..., Path]


ConfigStore.instance().store(name="schema", node=Config)  # as launch.py does

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # `pytest ... &` in a script ignores Ctrl-C, and so would every program that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden/ anew instead of comparing with it"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran against a real Slurm; where they did not, the reason stands above in the list of skips."""
    ran, skipped = (
        sum(
            report.nodeid.startswith("tests/slurm") for kind in kinds for report in terminalreporter.stats.get(kind, [])
        )
        for kinds in (("passed", "failed"), ("skipped",))
    )
    if ran or skipped:
        terminalreporter.write_line(f"{ran} tests ran against a real Slurm, {skipped} were skipped")


@cache
def _composed(words: tuple[str, ...], gpus: int) -> Config:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = resolve(hydra.compose("config", overrides=[f"run_dir={RUN_DIR}", *words]))
    localize.localize(config, gpus)
    return config


@pytest.fixture(scope="session")
def compose() -> Compose:
    """`compose("cluster=slurm", ...)`: the config that launch.py checks, on a machine of `gpus` GPUs. Yours to change."""

    def composed(*words: str, gpus: int = 0) -> Config:
        return deepcopy(_composed(words, gpus))

    return composed


def put(config: Config, values: Mapping[str, object]) -> Config:
    """Set dotted keys of a config, and return it."""
    for key, value in values.items():
        *sections, name = key.split(".")
        target: object = config
        for section in sections:
            target = getattr(target, section)
        assert hasattr(target, name), f"{key} is no key"
        setattr(target, name, value)
    return config


def bare(base: Path) -> dict[str, str]:
    """The environment of a bare login node below `base`: a home, no GPU, and a PATH on which there is nothing yet."""
    for name in ("home", "bin"):
        (base / name).mkdir(parents=True)
    return {
        "HOME": str(base / "home"),
        "PATH": str(base / "bin"),
        "CUDA_VISIBLE_DEVICES": "",
        "LANG": "C.UTF-8",
        "PYTHONWARNINGS": "error",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody answers: no test asks the Hub itself
    }


def python(*words: object, cwd: Path, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run this Python with `words`, in an environment of which nothing is inherited."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=60)


def called(
    main: Callable[[], int], *words: object, cwd: Path, env: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Call the `main` of a program with `words`, as `python` would run it: starting Python and importing Hydra takes longer."""
    out, err = StringIO(), StringIO()
    with chdir(cwd), pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name in {*os.environ} - {*env}:
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [*map(str, words)])
        try:
            code = main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        os.environ.pop("HYDRA_FULL_ERROR", None)  # what `launch` has added
        os.environ.pop("COMP_LINE", None)
    return subprocess.CompletedProcess([*map(str, words)], code, out.getvalue(), err.getvalue())


def module(name: str, *words: object, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Do what `python -m name words...` does from the root of the project, in this process."""
    program = import_module(f"{name}.__main__" if name == "launcher" else name)
    return called(program.main, name, *words, cwd=ROOT, env=env)


def write_programs(folder: Path, **scripts: str) -> Path:
    """Write shell programs into a folder, and return it. Each also appends its arguments to NAME.calls beside it."""
    for name, script in scripts.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "$*" >> "{path}.calls"\n{script}\n')
        path.chmod(0o755)
    return folder


@pytest.fixture
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A bare login node for this test alone."""
    return bare(tmp_path_factory.mktemp("machine"))


@pytest.fixture
def launch_process(tmp_path: Path, surroundings: dict[str, str]) -> Launch:
    """`launch_process("model=tiny", ...)` runs `python launch.py model=tiny ...` in `cwd`, in bare surroundings plus `env`."""

    def run(
        *words: str, cwd: Path = tmp_path, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return python(ROOT / "launch.py", *words, cwd=cwd, env=surroundings | dict(env or {}))

    return run


@pytest.fixture
def launch(tmp_path: Path, surroundings: dict[str, str], launch_process: Launch) -> Launch:
    """The same in this process, but for the flags of Hydra's own program."""

    def run(
        *words: str, cwd: Path = tmp_path, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        if {"-sc", "--cfg"} & {*words}:
            return launch_process(*words, cwd=cwd, env=env)
        env = surroundings | dict(env or {})
        return called(launch_program.main, ROOT / "launch.py", *words, cwd=cwd, env=env)

    return run


@pytest.fixture
def programs(surroundings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Programs:
    """`programs(squeue="echo '7|RUNNING'")` writes shell programs, and makes them all that is on PATH; see write_programs."""
    folder = Path(surroundings["PATH"])
    monkeypatch.setenv("PATH", str(folder))
    return partial(write_programs, folder)


def tool(name: str) -> str:
    """A program beside the interpreter, on PATH or where every Linux has it; skips the test where there is none."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:{os.defpath}"
    return shutil.which(name, path=path) or pytest.skip(f"no {name}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, which HF_ENDPOINT names; no token is set."""
    with hub_server.serve() as running:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running
