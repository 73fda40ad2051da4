"""launch.py, killed at any moment, leaves no half-written file, and the same command given again writes the rest.

A launch that runs its jobs here saves on Ctrl-C, and says how to go on.
"""

import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import launch as launch_program
from conf import resolve
from launcher.run_folder import attempts, record
from launcher.run_folder.status import STOPPED
from launcher.submit import interrupts
from tests.conftest import called
from tests.slurm.runs import wait_until
from tests.test_readme import CLONE

WORDS = ["cluster=slurm", "model=llama70b", "parallel=zero3", "submit=script"]


def test_a_killed_launch_can_be_repeated(tmp_path: Path) -> None:
    generator, began = random.Random(0), time.monotonic()
    launch(tmp_path / "run99")
    duration_s, expected = time.monotonic() - began, file_sizes(tmp_path / "run99")
    for number in range(12):
        run = tmp_path / f"run{number:02d}"  # as long a name as run99, so that the scripts have equal sizes
        with subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(duration_s * generator.uniform(0.4, 1.0))
            process.kill()
        for name in file_sizes(run):
            assert is_complete(run, name, expected[name]), name
        done = called(launch_program.main, *command(run)[1:], cwd=tmp_path, env=os.environ)
        assert done.returncode == 0, done.stderr
        assert file_sizes(run).keys() == expected.keys()


def command(run: Path) -> list[str]:
    return [sys.executable, str(CLONE / "launch.py"), *WORDS, f"run_dir={run}"]


def launch(run: Path) -> None:
    done = subprocess.run(command(run), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def file_sizes(run: Path) -> dict[str, int]:
    """Size of every file that a later command would read. Names that start with a dot are never read."""
    paths = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {
        str(path): (run / path).stat().st_size for path in paths if not any(part.startswith(".") for part in path.parts)
    }


def is_complete(run: Path, name: str, size: int) -> bool:
    path = run / name
    if name == "config.yaml":
        return resolve.load(path) is not None
    if path.suffix == ".json":
        return json.loads(path.read_text()) is not None
    return path.stat().st_size == size or path.name == "code.diff"


WAYS = {"Ctrl-C": 130, "a second Ctrl-C": 130, "the terminal closes": 129, "SIGTERM": 143}
"""How a launch in a terminal is ended, and its exit code."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [way if way == "Ctrl-C" else pytest.param(way, marks=pytest.mark.proof) for way in WAYS]
)
def test_a_local_launch_saves_before_it_ends(tmp_path: Path, way: str) -> None:
    """In a real terminal, where Ctrl-C goes to all processes of the foreground group."""
    run, shown = tmp_path / "run", bytearray()
    words = ["data=sample", "cluster=local", "pipeline=train", "train.steps=100000", f"run_dir={run}"]
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, str(CLONE / "launch.py"), *words], os.environ | {"TERM": "xterm"})
    reader = threading.Thread(target=read_all, args=(terminal, shown))
    reader.start()
    wait_until(lambda: any("loss" in line for line in attempts.metrics(run)))
    controller = record.newest_jobs(run)["train"].job_id
    if way == "the terminal closes":
        os.kill(
            process, signal.SIGHUP
        )  # the kernel sends it when the other end is closed, which a reader here prevents
    elif way == "SIGTERM":
        os.kill(process, signal.SIGTERM)
    else:
        os.write(terminal, b"\x03")
    if way == "a second Ctrl-C":
        wait_until(lambda: b"stopping" in shown)
        time.sleep(interrupts.SAME_REQUEST_S + 0.1)
        os.write(terminal, b"\x03")
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    reader.join(timeout=30)
    verdict = attempts.last_verdict(run / "jobs/train")
    text = shown.decode()
    assert code == WAYS[way], text
    assert verdict is not None and verdict["status"] == STOPPED
    assert not Path(f"/proc/{controller}").exists()
    if way != "the terminal closes":
        assert f"resume    muster resume {run}" in text
    assert "Traceback" not in text
    if way == "a second Ctrl-C":
        assert "without saving" in verdict["reason"]
    else:
        assert (run / f"checkpoints/step-{verdict['saved']:08d}").is_dir()


def read_all(terminal: int, shown: bytearray) -> None:
    """Collect what a terminal shows until its last process has ended."""
    with suppress(OSError):
        while part := os.read(terminal, 65536):
            shown += part


LAUNCHES = {
    "launch.py": [sys.executable, str(CLONE / "launch.py")],
    "muster": [sys.executable, "-m", "muster", "run"],
    "python -m launcher": [sys.executable, "-m", "launcher", "run"],
}
"""What a message begins with while modules are imported, and the command."""


def test_ctrl_c_at_any_moment_of_a_start_is_one_line_and_130() -> None:
    """While Hydra is imported, while the config is composed, and later. Python's own start may still show its traceback."""
    cases = [("launch.py", delay_s) for delay_s in (0.05, 0.2, 0.5, 0.9, 1.4, 2.0)]
    cases += [("muster", 0.1), ("muster", 0.4), ("muster", 1.0), ("python -m launcher", 0.3)]
    with ThreadPoolExecutor(len(cases)) as pool:
        found = [*pool.map(lambda case: interrupted(*case), cases)]
    for (prog, delay_s), (code, shown, errors) in zip(cases, found, strict=True):
        if "Traceback" in errors or (code == -signal.SIGINT and not shown):  # Python has not begun with our files
            assert delay_s < 0.5 and str(CLONE / "launch") not in errors, errors
        elif code == 130:
            assert errors in (f"{prog}: stopped\n", f"{prog} run: stopped\n"), errors
        else:  # all of it was printed before
            assert code in (0, -signal.SIGINT) and "#SBATCH" in shown and not errors, (prog, delay_s, code, errors)
    assert [code for code, _, _ in found].count(130) >= 3, found


def interrupted(prog: str, delay_s: float) -> tuple[int, str, str]:
    """The exit code, output and errors of a dry run that gets SIGINT after a while."""
    words = [*LAUNCHES[prog], *WORDS, "dry_run=true"]
    with subprocess.Popen(words, cwd=CLONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate()
    return process.returncode, shown, errors


def test_signals_that_come_together_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupts.noticed() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (requests.name, requests.exit_code, requests.again) == ("SIGTERM", 143, False)
        monkeypatch.setattr(interrupts, "SAME_REQUEST_S", 0.0)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not requests.again
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.again
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_has_gone_is_a_request_to_stop() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    requests = interrupts.Interrupts()
    with os.fdopen(writer, "w") as stream:
        requests.say("a line", stream)
        requests.say("another line", stream)  # goes nowhere, and raises nothing
    assert requests.first is signal.SIGHUP
