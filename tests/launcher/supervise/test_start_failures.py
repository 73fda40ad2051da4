"""launcher/supervise/start_failures.py: lines of srun, bash, containers and Python that end a job before its ranks speak."""

import pytest

from launcher.supervise import start_failures

SCRIPT = "/var/spool/slurm/d/job00009/slurm_script: "
USER_ERRORS = {
    "module": f"{SCRIPT}line 18: module: command not found",
    "unknown module": 'The following module(s) are unknown: "cuda/99"',
    "unknown module, Tcl": "ERROR: Unable to locate a modulefile for 'cuda/99'",
    "python": f"{SCRIPT}line 50: /opt/conda/envs/muster/bin/python: No such file or directory",
    "python of ranks": "slurmstepd: error: execve(): /opt/conda/bin/python3.11: No such file or directory",
    "program of ranks": "slurmstepd-n1: error: execve(): /opt/wrap: Permission denied",
    "setup": f"{SCRIPT}line 18: /opt/site.sh: No such file or directory",
    "syntax": f"{SCRIPT}line 20: syntax error near unexpected token `done'",
    "environment of a job": "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.",
    "step": "srun: error: Unable to create step for job 7: More processors requested than permitted",
    "gres": "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification",
    "memory": "srun: error: Unable to create step for job 7: Memory required by task is not available",
    "option": "srun: unrecognized option '--nonsense'",
    "mpi": "srun: error: Couldn't find the specified plugin name for mpi/pmix looking at all files",
    "no pyxis": "srun: unrecognized option '--container-image=/images/none.sqsh'",
    "pyxis": "slurmstepd: error: pyxis: failed to import docker image",
    "image": "FATAL:   could not open image /images/none.sif: failed to retrieve path for /images/none.sif",
    "apptainer": "slurmstepd: error: execve(): apptainer: No such file or directory",
    "library": "python3: error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file",
    "machine": f"{SCRIPT}line 50: /opt/python: cannot execute binary file: Exec format error",
    "package": "/usr/bin/python3: No module named submitit",
    "package of a program": "/usr/bin/python3: Error while finding module specification for 'submitit.core._submit' "
    "(ModuleNotFoundError: No module named 'submitit')",
    "package of a module": "ModuleNotFoundError: No module named 'torch'",
    "disk": "OSError: [Errno 28] No space left on device: '/scratch/run/jobs/train/attempt-1'",
    "run folder": "muster: /home/me/run/jobs/train: cannot be written: [Errno 30] Read-only file system",
    "own message": "muster: cluster.container: apptainer cannot be started on n1",
    "output": "slurmstepd: error: could not open stdout file /run/rank-0.log: Permission denied",
}
OTHERS = {
    "slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch. Some of the step tasks have been OOM Killed.": "out_of_memory",
    "slurmstepd: error: TaskProlog failed status=1": "bad_node",
    "srun: error: Prolog hung on node n2": "bad_node",
    "RuntimeError: CUDA error: uncorrectable ECC error encountered": "bad_node",
    "ValueError: unknown": "failed",
}
NO_FAILURE = [
    "srun: error: Unable to create step for job 7: Job/step already completing or completed",
    "srun: error: Unable to create step for job 7: Socket timed out on send/recv operation",
    "srun: error: Task launch for StepId=3.0 failed on node n2: Invalid job credential",
    "srun: error: n2: task 3: Killed",
    "srun: error: n1: tasks 0-1: Exited with exit code 2",
    "slurmstepd: error: *** STEP 3.0 ON n1 CANCELLED AT 2026-11-29T02:00:00 DUE TO TIME LIMIT ***",
    "slurmstepd: error: couldn't chdir to `/run/code': No such file or directory: going to /tmp instead",
    f"{SCRIPT}line 60: 1234 Killed                  python -m launcher.supervise.attempt finish",
    "step 1/40 loss 1.2",
]


@pytest.mark.parametrize("line", USER_ERRORS.values(), ids=USER_ERRORS)
def test_what_the_user_can_mend_is_a_users_error_with_its_line_and_a_remedy(line: str) -> None:
    found = start_failures.find(f"first\n{line}\nsrun: error: n1: task 0: Exited with exit code 1\n")
    assert found and found["status"] == "user_error"
    assert found["reason"].split(", ")[-1] in line
    assert found["remedy"] or line.startswith("muster: ")
    assert SCRIPT not in found["reason"]


@pytest.mark.parametrize("line", OTHERS)
def test_other_failures_have_their_status(line: str) -> None:
    found = start_failures.find(line)
    assert found and (found["status"], found["reason"]) == (OTHERS[line], line)


@pytest.mark.parametrize("line", NO_FAILURE)
def test_what_may_not_come_again_is_no_failure_at_the_start(line: str) -> None:
    assert start_failures.find(line) is None


def test_the_last_failure_is_the_cause() -> None:
    lines = [f"{SCRIPT}line 18: module: command not found", "muster: module load failed"]
    found = start_failures.find("\n".join(lines))
    assert found and "line 18" in found["reason"]
    lines = [f"{SCRIPT}line 3: tput: command not found", USER_ERRORS["python"], "muster: done"]
    found = start_failures.find("\n".join(lines))
    assert found and "/opt/conda" in found["reason"]


def test_the_last_error_of_srun_is_found() -> None:
    assert start_failures.last_error("\n".join([*NO_FAILURE[:2], *NO_FAILURE[3:]])) == NO_FAILURE[1]
    assert start_failures.last_error("step 1") == ""
