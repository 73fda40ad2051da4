"""jobs/programs: the command line of a task, its environment, and what the output of a failed program says."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from conf import packages
from conf.program_checkpoints import numbered
from jobs.programs import failure
from jobs.programs.command import Place, words
from jobs.programs.nvidia_driver import all_peers, lowest_capability
from jobs.programs.variables import program_variables
from launcher.supervise.program_failure import ALONE, status_and_remedy
from muster import ray_lines
from tests.conftest import Compose

PLACE = Place(task=1, tasks=2, address="n1", port="20000")
TORCHRUN = (
    "-m torch.distributed.run --nnodes=2 --node-rank=1 --nproc-per-node=8 --master-addr=n1 --master-port=20000 --tee=3"
)


@pytest.mark.parametrize(
    ("command", "launcher", "expected"),
    [
        ("python train.py --a 'b c'", "srun", ["PY", "train.py", "--a", "b c"]),
        ("/x/python train.py", "srun", ["/x/python", "train.py"]),
        ("train.py --x", "srun", ["PY", "train.py", "--x"]),
        ("bash train.sh $MUSTER_CHECKPOINTS/x $UNSET", "srun", ["bash", "train.sh", "/c/x", "$UNSET"]),
        ("python -u train.py --x", "torchrun", ["PY", *TORCHRUN.split(), "--log-dir=/l/torchrun", "train.py", "--x"]),
        (
            "/x/python3.12 -m a.b",
            "torchrun",
            ["/x/python3.12", *TORCHRUN.split(), "--log-dir=/l/torchrun", "-m", "a.b"],
        ),
        ("train.py", "torchrun", ["PY", *TORCHRUN.split(), "--log-dir=/l/torchrun", "train.py"]),
    ],
)
def test_the_command_of_a_task(compose: Compose, command: str, launcher: str, expected: list[str]) -> None:
    config = compose("cluster=slurm", "pipeline=custom", f"custom.launcher={launcher}")
    config.custom.command = command
    assert words(config, PLACE, "PY", {"MUSTER_CHECKPOINTS": "/c", "MUSTER_LOCAL": "/l"}) == expected


def test_accelerate_is_told_where_it_runs(compose: Compose) -> None:
    config = compose("cluster=slurm", "pipeline=custom", "custom.launcher=accelerate")
    config.custom.command = "--config_file mine.yaml train.py --x"
    found = words(config, PLACE, "PY", {"MUSTER_LOCAL": "/l"})
    assert found[:3] == ["PY", "-m", "accelerate.commands.launch"]
    assert found[-4:] == ["--config_file", "mine.yaml", "train.py", "--x"]  # the last of two wins
    options = launch_command_parser().parse_args([*found[3:-4], "train.py"])
    place = (options.num_machines, options.machine_rank, options.num_processes, options.main_process_ip)
    assert place == (2, 1, 16, "n1")
    assert (options.main_process_port, options.config_file) == (20000, "/l/accelerate.json")


def test_ray_is_told_where_it_runs_and_what_the_node_has(compose: Compose) -> None:
    config = compose("cluster=slurm", "pipeline=custom", "custom.launcher=ray", "cluster.train.cpus_per_rank=4")
    config.custom.command = "/x/python train.py --x"
    values = program_variables(config, {"RAY_DEDUP_LOGS": "1"}, Path("/attempt"), Path("/l"))
    found = words(config, PLACE, "PY", values)
    assert found[:3] == ["/x/python", "-m", "muster.ray_node"]
    assert found[-3:] == ["--", "train.py", "--x"]
    place = {"--node=1", "--nodes=2", "--address=n1", "--port=20000", "--shared=/attempt/ray", "--local=/l"}
    assert place | {"--cpus=32", "--gpus=8"} <= set(found)
    assert (values["MUSTER_RANKS"], values["RAY_DEDUP_LOGS"]) == (str(config.cluster.train.nodes * 8), "1")


def test_lines_of_workers_of_ray_go_to_the_logs_of_their_ranks() -> None:
    marks = ray_lines.Marks("muster-rank-", "10.0.0.1")
    color = b"\x1b[36m(%s)\x1b[0m %s\n"
    assert marks.lines(color % (b"RayTrainWorker pid=7, ip=10.0.0.2", b"step 1")) == []  # its rank comes later
    placed = color % (b"TrainController pid=5", b"- (ip=10.0.0.2, pid=7) world_rank=3, local_rank=1, node_rank=1")
    assert marks.lines(b"(RayTrainWorker pid=7) step 0\n") == []
    assert marks.lines(placed) == [b"[muster-rank-3]:step 1\n", placed]
    first = b"(TrainController pid=5) - (ip=10.0.0.1, pid=7) world_rank=0, local_rank=0, node_rank=0\n"
    assert marks.lines(first) == [b"[muster-rank-0]:step 0\n", first]
    assert marks.lines(color % (b"RayTrainWorker pid=7, ip=10.0.0.2", b"step 2")) == [b"[muster-rank-3]:step 2\n"]
    assert marks.lines(b"(RayTrainWorker pid=7) step 1\n") == [b"[muster-rank-0]:step 1\n"]
    assert marks.lines(b"(PlacementGroupCleaner pid=9) Failed\n") == []
    assert marks.lines(b"(a) my own line\n") == [b"(a) my own line\n"]


def test_no_line_is_lost_if_ray_names_no_ranks() -> None:
    marks = ray_lines.Marks("muster-rank-", "10.0.0.1")
    sent = [b"(RayTrainWorker pid=7) step %d\n" % number for number in range(ray_lines.KEPT + 2)]
    found = [item for line in sent for item in marks.lines(line)] + marks.rest()
    assert found == sent


def test_a_python_without_ray_is_named(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("cluster=slurm", "pipeline=custom", "custom.launcher=ray")
    config.custom.command = "python train.py"
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert ["pip install 'ray[train]'" in str(problem) for problem in packages.missing(config)] == [True]
    config.custom.command = "/other/python train.py"
    assert not list(packages.missing(config))


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_program_sees_only_the_package_muster(compose: Compose, launcher: str) -> None:
    config = compose("cluster=slurm", "pipeline=custom", f"custom.launcher={launcher}")
    environ = {"PYTHONPATH": f"{config.run_dir}/code:/mine", "PYTHONSAFEPATH": "1", "RANK": "1", "A": "b"}
    values = program_variables(config, environ, Path("/attempt"), Path("/local"))
    assert values["PYTHONPATH"] == f"{config.run_dir}/code/for_programs:/mine"
    assert "PYTHONSAFEPATH" not in values
    assert ("RANK" in values) is (launcher == "srun")
    assert (values["A"], values["MUSTER_STOP_FILE"]) == ("b", "/attempt/stop")


OUT_OF_MEMORY = """\
step 3
Traceback (most recent call last):
  File "train.py", line 5, in <module>
    main()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
"""
OF_TORCHRUN = """\
Traceback (most recent call last):
  File "run.py", line 1, in main
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: train.py FAILED
"""
OF_RAY = """\
Traceback (most recent call last):
  File "train.py", line 21, in <module>
ray.train.WorkerGroupError: Training failed due to worker errors:
[Rank 2 Error Snippet]:
Traceback (most recent call last):
  File "train.py", line 14, in work
ValueError: no such column
"""
NOT_COUNTED = f"Traceback (most recent call last):\nAssertionError: {ALONE} 4 != 4 * 1 * 2\n"
LOST = "Traceback (most recent call last):\n  File\nRuntimeError: Connection closed by peer\n"


@pytest.mark.parametrize(
    ("last", "rank", "status", "text"),
    [
        ({0: OF_TORCHRUN, 5: OUT_OF_MEMORY, 2: LOST}, 5, "out_of_memory", "OutOfMemoryError: CUDA out of memory"),
        ({0: OF_TORCHRUN, 2: LOST}, 2, "failed", "RuntimeError: Connection closed"),
        ({0: OF_RAY}, 2, "failed", "ValueError: no such column"),
        ({1: NOT_COUNTED}, 1, "user_error", "AssertionError: train_batch_size"),
        ({4: "done"}, 4, "failed", "the program ended with exit code 1; its log has no traceback"),
        ({0: "Traceback (most recent call last):\nModuleNotFoundError: No module named 'x'"}, 0, "user_error", "Mod"),
    ],
)
def test_the_first_rank_that_failed_is_found_in_the_output(
    last: dict[int, str], rank: int, status: str, text: str
) -> None:
    found = failure.find({key: value.splitlines() for key, value in last.items()}, "ended with exit code 1", 4)
    assert found.rank == rank
    assert str(found).startswith(text)
    assert status_and_remedy(found.exception, str(found))[0] == status
    assert "train." not in status_and_remedy(found.exception, str(found))[1]


def test_checkpoints_of_every_program_are_found(tmp_path: Path) -> None:
    for name in ("checkpoint-500", "step_20", "global_step3", "checkpoints/checkpoint_7", "logs", "tmp-checkpoint-900"):
        (tmp_path / name).mkdir(parents=True)
    found = [(number, str(path.relative_to(tmp_path))) for number, path in numbered(tmp_path)]
    assert found == [(3, "global_step3"), (7, "checkpoints/checkpoint_7"), (20, "step_20"), (500, "checkpoint-500")]


DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 3; return 0; }
int cuDeviceCanAccessPeer(int *answer, int device, int other) { *answer = ANSWER; return 0; }
int cuDeviceGetAttribute(int *value, int number, int device) { *value = number == 75 ? (device == 1 ? 7 : 8) : 5; return 0; }
"""
"""Three GPUs; the second is one of compute capability 7.5, the others are of 8.5."""


@pytest.mark.parametrize(("answer", "expected"), [("1", True), ("device != 2", False)])
def test_gpus_without_peer_access_are_noticed(tmp_path: Path, answer: str, expected: bool) -> None:
    (tmp_path / "cuda.c").write_text(DRIVER.replace("ANSWER", answer))
    library = tmp_path / "cuda.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "cuda.c"], check=True)
    assert all_peers(str(library)) is expected
    assert lowest_capability(str(library)) == (7, 5)


def test_without_a_driver_nothing_is_disabled() -> None:
    assert all_peers("libcuda-that-does-not-exist.so")
    assert lowest_capability("libcuda-that-does-not-exist.so") is None
