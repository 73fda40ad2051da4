"""Starts the ranks of one job on this machine: submitit's local executor, in a session of its own, which Ctrl-C does not reach."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from submitit import LocalExecutor

from launcher.plan import Job


class Executor(LocalExecutor):  # type: ignore[misc] # submitit has no annotations for mypy
    """submitit's executor for one job. What its controller prints goes to the file `log`."""

    def __init__(self, folder: Path, python: str, job: Job, log: Path, signal_s: int) -> None:
        super().__init__(folder, python=python)
        self.job, self.log, self.signal_s = job, log, signal_s
        self.update_parameters(tasks_per_node=job.resources.ranks_per_node, stderr_to_stdout=True)

    def _submit_command(self, command: str) -> Any:
        # As submitit's start_controller, which leaves the controller and the ranks in the session of the terminal: Ctrl-C
        # would end them all before they have saved.
        part = self.job.resources
        values = {
            "SUBMITIT_LOCAL_NTASKS": str(part.ranks_per_node),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * part.time_min),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(self.signal_s),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "SUBMITIT_EXECUTOR": "local",
            "CUDA_VISIBLE_DEVICES": ",".join(_devices(part.gpus_per_node or 0)),
        }
        words = [sys.executable, "-m", "submitit.local._local", str(self.folder)]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                words, env=os.environ | values, stdout=log, stderr=log, start_new_session=True, stdin=subprocess.DEVNULL
            )
        return self.job_class(self.folder, str(process.pid), process=process, tasks=list(range(part.ranks_per_node)))


def end(started: Any) -> int:
    """End the ranks of a job that still run. Returns its exit code: 0 if all ranks ended by themselves with 0."""
    process = started._process
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 143
    # submitit writes a rank's result file only if its function has returned
    tasks = started._sub_jobs or [started]
    return 0 if all(task.paths.result_pickle.exists() for task in tasks) else 1


def _devices(count: int) -> list[str]:
    """The first `count` GPUs that this process may see."""
    given = [item.strip() for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item.strip()]
    return (given or [str(number) for number in range(count)])[:count]
