"""`muster efficiency`: figures that are computed by hand from the records of a run with a restart."""

import json
from pathlib import Path

import pytest

from conf import resolve
from conf.files import write_json
from launcher import __main__ as muster
from launcher.status import accounting, efficiency
from tests.conftest import Compose, Programs

NOON = 1796040000.0  # 2026-11-30 12:00 UTC
SACCT = """
102|/another/run/code|90000|64|1-00:00:00|9999M|cpu=64,mem=9999M||
102.batch||90000|64|1-00:00:00|||mem=999999M|
102|CODE|400|32|01:00:00|512000M|billing=32,cpu=32,gres/gpu=8,mem=512000M,node=2||
102.batch||400|16|00:10.500|||cpu=00:00:10,mem=100M|cpu=00:00:10,mem=100M
102.0||400|32|00:00:01|||cpu=01:39:50,mem=204800M|cpu=00:20:00,gres/gpumem=10000M,gres/gpuutil=90,mem=25600M
102|CODE|200|32|01:00:00|512000M|billing=32,cpu=32,gres/gpu=8,mem=512000M,node=2||
102.batch||200|16|00:10.500|||cpu=00:00:10,mem=100M|cpu=00:00:10,mem=100M
102.0||200|32|00:59:00|||cpu=00:59:00,mem=4800M|gres/gpuutil=30,mem=1M
"""


@pytest.fixture
def run(tmp_path: Path, compose: Compose, programs: Programs) -> Path:
    """Two nodes with four GPUs each. Waits 60 s, trains for 400 s, is preempted, waits 100 s, and trains for 200 s more."""
    run = tmp_path / "run"
    words = [
        "cluster=slurm",
        "cluster.train.nodes=2",
        "cluster.train.ranks_per_node=4",
        "cluster.train.gpus_per_node=4",
    ]
    words += ["cluster.train.cpus_per_rank=4", "cluster.train.memory_gib=250", "cluster.train.gpu_memory_gib=79"]
    resolve.save(compose(*words), run / "config.yaml")
    launch = {
        "command": [],
        "time": "2026-11-30T12:00:00+0000",
        "cluster": "slurm",
        "jobs": {"preprocess": "101", "train": "102"},
    }
    write_json(run / "run.json", {"launches": [launch]})
    attempt(run, "preprocess", 1, "101", (5, 95), "completed")
    attempt(run, "train", 1, "102", (155, 555), "preempted", step=40, requeued=True)
    attempt(run, "train", 2, "102", (655, 855), "completed", step=60, resumed=30)
    lines = [
        {"step": n, "loss": 1.0, "seconds": 5.0, "mfu": 0.4, "memory_gib_max": 60.0 + n / 60} for n in range(1, 61)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    programs(sacct=f"/bin/cat <<'END'{SACCT.replace('CODE', str(run / 'code'))}END")
    return run


def attempt(
    run: Path,
    job: str,
    number: int,
    job_id: str,
    times: tuple[int, int],
    status: str,
    resumed: int = 0,
    **verdict: object,
) -> None:
    folder = run / "jobs" / job
    began, ended = (NOON + seconds for seconds in times)
    write_json(folder / f"attempt-{number}/begin.json", {"job_id": job_id, "started": began, "resumed": resumed})
    write_json(folder / f"attempt-{number}/rank-0.json", {"cpu_s": (ended - began) / 2})
    write_json(folder / f"attempt-{number}.json", {"status": status, "started": began, "ended": ended} | verdict)


def test_the_figures_are_those_computed_by_hand(run: Path) -> None:
    preprocess, train = efficiency.read(run)
    assert (preprocess.waited_s, preprocess.ran_s, preprocess.lost_s, preprocess.gpu_hours) == (5, 90, 0, 0)
    assert (train.attempts, train.gpus, train.cpus) == (2, 8, 32)
    assert (train.waited_s, train.ran_s) == (60 + 100, 400 + 200)
    assert train.lost_s == (40 - 30) * 5, "ten steps of five seconds were done twice"
    assert train.gpu_hours == pytest.approx(8 * 600 / 3600)
    assert (train.in_steps, train.mfu, train.gpu_memory_gib) == (0.5, 0.4, 61.0)
    killed_s = 10.5 + 5990  # the samples of a killed step have more than its TotalCPU
    assert train.cpu_share == pytest.approx((killed_s + 3600) / (32 * 600))
    assert (train.memory_gib, train.memory_asked_gib) == (200, 500)
    assert train.gpu_share == pytest.approx((0.9 * 400 + 0.3 * 200) / 600)


def test_without_accounting_the_cpu_time_of_rank_0_counts(
    run: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert muster.main(["efficiency", str(run)]) == 0
    said = "note: Slurm's accounting does not answer (Slurm accounting storage is disabled): use of memory and GPUs is unknown"
    assert capsys.readouterr().out.splitlines()[-1].startswith(said)
    _, train = efficiency.read(run)
    assert (train.gpu_share, train.memory_gib, train.memory_asked_gib) == (None, None, 500)
    assert train.cpu_share == pytest.approx(0.5 / 4), "half a CPU of four"


def test_the_command_prints_a_table_or_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert muster.main(["efficiency", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["job", "preprocess", "train", "all", "note:"]
    assert lines[-1] == "note: Slurm's accounting does not know 101: forgotten, or of another cluster"
    assert "61.0 of 79" in lines[2]
    assert "200.0 of 500" in lines[2]
    assert lines[3].split() == ["all", "0:11:30", "0:02:45", "0:00:50", "1.3"]
    assert muster.main(["efficiency", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["lost_s"] == 50


def test_attempts_on_other_numbers_of_gpus_count_with_their_own(run: Path) -> None:
    begin = run / "jobs/train/attempt-2/begin.json"
    write_json(begin, json.loads(begin.read_text()) | {"gpus": 2})
    assert efficiency.read(run)[1].gpu_hours == pytest.approx((8 * 400 + 2 * 200) / 3600)


def test_a_run_on_this_machine_waits_in_no_queue(run: Path) -> None:
    launch = {"command": [], "time": "2026-11-30T12:00:00+0000", "cluster": "local", "jobs": {"train": "5"}}
    write_json(run / "run.json", {"launches": [launch]})
    assert [job.waited_s for job in efficiency.read(run)] == [None, None]


@pytest.mark.parametrize(
    ("text", "expected"), [("1-02:03:04", 93784), ("02:03.500", 123.5), ("00:00:00", 0), ("", 0), ("INVALID", 0)]
)
def test_times_of_sacct_are_read(text: str, expected: float) -> None:
    assert accounting.seconds(text) == expected
