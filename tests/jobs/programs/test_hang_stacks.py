"""The Python stacks of a program that hangs: real processes are aborted, and the diagnosis names the line of the program."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jobs.programs import hang_stacks, processes
from launcher.supervise.hang_diagnosis import diagnose

PROGRAM = """
import os, sys, time
def load_rows():
    print("ready", flush=True)
    time.sleep(1000)
if os.fork() == 0:  # as a process that loads data
    time.sleep(1000)
load_rows()
"""
WAITS = """\
Fatal Python error: Aborted

Current thread 0x1 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 5 in barrier
  File "/me/train.py", line 9 in <module>
"""
WORKS = """\
step 3
Fatal Python error: Aborted

Thread 0x2 (most recent call first):
  File "/x/threading.py", line 5 in wait

Current thread 0x1 (most recent call first):
  File "/x/torch/utils/data.py", line 2 in read
  File "/me/train.py", line 7 in load_rows

Extension modules: numpy
"""


def test_only_ranks_are_aborted_and_write_their_stacks(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    environ = os.environ | {"PYTHONFAULTHANDLER": "1"}
    script = f"RANK=3 {sys.executable} {tmp_path}/train.py; echo rank ended; sleep 1000"
    program = subprocess.Popen(
        ["bash", "-c", script], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "ready\n"
        time.sleep(0.2)
        before = processes.descendants(program.pid)
        processes.abort_ranks(program.pid)
        lines = [next(program.stdout).rstrip("\n") for _ in range(6)]
        assert any(f'File "{tmp_path}/train.py", line 5 in load_rows' in line for line in lines), lines
        assert program.poll() is None
        assert (
            sum(Path(f"/proc/{process}").exists() for process in before) >= 2
        )  # bash, and the process that loads data
    finally:
        for process in before:
            subprocess.run(["kill", "-9", str(process)], capture_output=True, check=False)
        program.stdout.close()
        program.wait()


def test_the_rank_that_the_others_wait_for_comes_last() -> None:
    text = hang_stacks.text({5: WORKS.splitlines(), 4: WAITS.splitlines(), 6: ["no stack"]})
    assert text.index("rank 4:") < text.index("rank 5:")
    assert "rank 6" not in text
    evidence = {"answered": True, "count": 2, "step": 3, "phase": "train", "state": "S", "host": "n1", "stack": text}
    reason = diagnose({0: evidence}, 1, "/me")["reason"]
    assert "at train.py:7 load_rows, inside read (data.py:2)" in reason


RAY_WORKER = """
import os, threading, time
from muster import beat
def train():
    beat(1)
    print("ready", flush=True)
    time.sleep(1000)
thread = threading.Thread(target=train)
thread.start()
thread.join()
"""


def test_a_worker_of_ray_writes_the_stack_of_its_training_thread(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(RAY_WORKER)
    environ = os.environ | {
        "MUSTER_BEATS": str(tmp_path),
        "MUSTER_RANKS": "4",
        "RANK": "3",
        "PYTHONPATH": str(Path.cwd()),
    }
    words = [sys.executable, tmp_path / "train.py"]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(0.2)
        processes.tell(worker.pid, signal.SIGQUIT)
        time.sleep(0.5)
        stacks = hang_stacks.of_workers(tmp_path)
        worker.kill()
    assert 'train.py", line 7 in train' in "\n".join(stacks[3])
    assert sum("most recent call first" in line for line in stacks[3]) == 1
