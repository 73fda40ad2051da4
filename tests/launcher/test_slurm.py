"""launcher/slurm.py and slurm_command.py on small programs that print the output of Slurm's commands."""

import time
from pathlib import Path

import pytest

from launcher import slurm, slurm_array, slurm_command
from tests.conftest import Programs

FAILS = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
SCONTROL_JOB = 'echo "JobId=$3 JobName=a"; echo "   JobState=$S Reason=None"'


@pytest.mark.parametrize(
    ("scripts", "expected"),
    [
        ({"squeue": "echo '7|RUNNING'; echo '8|PENDING'; echo '99|RUNNING'"}, {"7": "RUNNING", "8": "PENDING"}),
        (
            {"squeue": "echo '8|PENDING'", "sacct": "echo '7|COMPLETED'"},
            {"7": "COMPLETED", "8": "PENDING"},
        ),
        (
            {"squeue": ":", "sacct": "echo '7|CANCELLED by 1000'; echo '8|OUT_OF_MEMORY'"},
            {"7": "CANCELLED", "8": "OUT_OF_MEMORY"},
        ),
        (
            {"squeue": "echo '8|RUNNING'", "sacct": FAILS, "scontrol": f"S=TIMEOUT; {SCONTROL_JOB}"},
            {"7": "TIMEOUT", "8": "RUNNING"},
        ),
        (
            {"squeue": FAILS, "sacct": FAILS, "scontrol": f'[ "$3" = 7 ] || exit 1; S=FAILED; {SCONTROL_JOB}'},
            {"7": "FAILED"},
        ),
        ({"scontrol": f"S=COMPLETED; {SCONTROL_JOB}"}, {"7": "COMPLETED", "8": "COMPLETED"}),
        ({"squeue": FAILS, "sacct": FAILS, "scontrol": FAILS}, {}),
        ({}, {}),
    ],
    ids=[
        "squeue knows both",
        "sacct knows the ended one",
        "states of sacct",
        "scontrol where there is no accounting",
        "scontrol alone, of one",
        "no squeue and no sacct",
        "no command knows the job",
        "no Slurm at all",
    ],
)
def test_the_state_comes_from_the_first_command_that_knows_the_job(
    programs: Programs, scripts: dict[str, str], expected: dict[str, str]
) -> None:
    programs(**scripts)
    assert {job_id: job.state for job_id, job in slurm.jobs(["7", "8"]).items() if not job.silence} == expected


def test_the_name_of_a_job_may_have_any_bytes(programs: Programs) -> None:
    programs(squeue="printf '6|RUNNING|you|caf\\351|/x\\n7|RUNNING|me|caf\\303\\251|/x\\n'")
    assert {job_id: job.name for job_id, job in slurm.jobs(["6", "7"]).items()} == {"6": "caf\ufffd", "7": "café"}


def test_later_commands_get_only_unknown_jobs(programs: Programs) -> None:
    folder = programs(squeue="echo '7|RUNNING'", sacct="echo '8|COMPLETED'", scontrol="exit 1")
    slurm.jobs(["7", "8"])
    assert "--jobs 8\n" in (folder / "sacct.calls").read_text()
    assert not (folder / "scontrol.calls").exists()


def test_without_jobs_no_command_is_called(programs: Programs) -> None:
    folder = programs(squeue="exit 0", sacct="exit 0", scontrol="exit 0")
    assert slurm.jobs([]) == {}
    assert not list(folder.glob("*.calls"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'sacct: error: no database' >&2; echo 'more' >&2; exit 1", "^sacct: error: no database$"),
        ("echo 'on stdout'; exit 1", "^on stdout$"),
        ("exit 3", "^sacct exited with 3$"),
        ("while :; do :; done", "^sacct did not answer within 0 s$"),
    ],
    ids=["its first error line", "its first line", "its exit code", "no answer"],
)
def test_a_failed_command_gives_its_first_error_line(programs: Programs, script: str, message: str) -> None:
    programs(sacct=script)
    with pytest.raises(slurm.SlurmError, match=message):
        slurm.call("sacct", timeout_s=0.3)


def test_a_missing_command_is_named(programs: Programs) -> None:
    programs()
    with pytest.raises(slurm.SlurmError, match="^squeue is not on PATH$"):
        slurm.call("squeue")


@pytest.mark.parametrize(
    ("printed", "address"),
    [("NodeName=n1 Arch=x86\n   NodeAddr=10.1.2.3 NodeHostName=n1", "10.1.2.3"), ("NodeName=n1", None)],
)
def test_the_address_of_a_node_is_its_nodeaddr(programs: Programs, printed: str, address: str | None) -> None:
    programs(scontrol=f"echo '{printed}'")
    assert slurm.node_address("n1") == address


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("Resources|2030-01-02T03:04:05", ("Resources", "2030-01-02T03:04:05")),
        ("Priority|N/A", ("Priority", "N/A")),
        ("(null)|", ("(null)", "N/A")),
        ("", ("none", "N/A")),
    ],
)
def test_pending_reason(programs: Programs, printed: str, expected: tuple[str, str]) -> None:
    programs(squeue=f"echo '{printed}'")
    assert slurm.pending_reason("7") == expected


def test_jobs_are_cancelled_with_one_call(programs: Programs) -> None:
    folder = programs(scancel="exit 0")
    slurm.cancel(["7", "8"])
    assert (folder / "scancel.calls").read_text() == "7 8\n"


@pytest.mark.parametrize(
    ("printed", "seconds"),
    [
        ("0:07", 7),
        ("59:00", 3540),
        ("1:00:01", 3601),
        ("2-01:00:00", 176_400),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_seconds_left(programs: Programs, printed: str, seconds: float | None) -> None:
    programs(squeue=f"echo ' {printed}'")
    assert slurm.seconds_left("7") == seconds


def test_the_time_left_of_several_jobs_is_asked_once(programs: Programs) -> None:
    folder = programs(squeue="echo 'CLUSTER: a'; echo '7|1:00:00'; echo '8|UNLIMITED'; echo '9|00:30'")
    assert slurm.all_seconds_left(["7", "8", "9"]) == {"7": 3600.0, "9": 30.0}
    assert slurm.all_seconds_left([]) == {}
    assert len((folder / "squeue.calls").read_text().splitlines()) == 1


def test_show_job_returns_the_controllers_fields(programs: Programs) -> None:
    programs(
        scontrol="echo 'JobId=7 JobName=a/train JobState=RUNNING Reason=None Restarts=2 ExcNodeList=n[1-2],n4 Comment=a=b'"
    )
    fields = slurm.show_job("7")
    assert [fields[name] for name in ("JobState", "Restarts", "ExcNodeList")] == ["RUNNING", "2", "n[1-2],n4"]


def test_a_job_is_requeued_and_nodes_are_excluded(programs: Programs) -> None:
    folder = programs(scontrol="exit 0")
    slurm.requeue("7")
    slurm.exclude("7", ["n[1-2]", "n4"])
    assert (folder / "scontrol.calls").read_text() == "requeue 7\nupdate JobId=7 ExcNodeList=n[1-2],n4\n"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds."""
    monkeypatch.setattr(slurm_command, "SHORTEST_PAUSE_S", 0.01)
    monkeypatch.setattr(slurm_command, "LONGEST_PAUSE_S", 0.02)


BUSY = (
    "squeue: error: slurm_load_jobs error: Socket timed out on send/recv operation",
    "slurm_load_jobs error: Zero Bytes were transmitted or received",
    "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
    "Slurm temporarily unable to accept job, sleeping and retrying",
    "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
    "Unable to contact slurm controller (connect failure)",
    "scontrol: error: Munge decode failed: Expired credential",
    "Job can not be altered now, try again later",
    "Rate limit exceeded, please retry momentarily",
)
FINAL = (
    "sbatch: error: Batch job submission failed: Invalid partition name specified",
    "Invalid job id specified",
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)",
    "Requested operation is presently disabled",
    "Incompatible versions of client and server code",
    "Access/permission denied",
)


def fails_first(folder: Path, times: int, text: str, then: str) -> str:
    """A program that prints `text` as its error `times` times, and then does `then`."""
    return (
        f'n=0; [ -e "{folder}/n" ] && read -r n < "{folder}/n"; echo $((n + 1)) > "{folder}/n"\n'
        f'if [ "$n" -lt {times} ]; then echo "{text}" >&2; exit 1; fi\n{then}'
    )


@pytest.mark.site(
    case="The controller is overloaded, restarts or fails over",
    before="one error of Slurm ended the launch, or the requeue of a training that had saved its work",
    after="every command is tried again with growing pauses: in a job for as long as it lives, on the login node for minutes",
)
@pytest.mark.parametrize("text", BUSY)
def test_a_busy_slurm_is_asked_again(programs: Programs, tmp_path: Path, quick: None, text: str) -> None:
    programs(squeue=fails_first(tmp_path, 3, text, "echo '7|RUNNING'"))
    with slurm.retrying():
        assert slurm.call("squeue") == "7|RUNNING\n"
    assert (tmp_path / "n").read_text() == "4\n"


@pytest.mark.parametrize("text", FINAL)
def test_a_final_error_is_not_repeated(programs: Programs, tmp_path: Path, quick: None, text: str) -> None:
    programs(squeue=fails_first(tmp_path, 3, text, "exit 0"))
    with slurm.retrying(), pytest.raises(slurm.SlurmError, match="(?i)" + text[:20].replace("(", ".")):
        slurm.call("squeue")
    assert (tmp_path / "n").read_text() == "1\n"


def test_the_wait_on_the_login_node_is_bounded_and_announced_once(
    programs: Programs, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(squeue=f"echo '{BUSY[0]}' >&2; exit 1")
    began = time.monotonic()
    with slurm.retrying(0.5):
        for _ in range(3):  # the limit holds for all commands together
            with pytest.raises(slurm.BusyError, match="Socket timed out"):
                slurm.call("squeue")
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err.count("trying again for up to") == 1


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    patience = slurm_command.Patience(float("inf"))
    for tries in range(40):
        patience.pause(slurm.BusyError("busy"), tries, 0.0)
    assert pauses[0] <= slurm_command.SHORTEST_PAUSE_S < 10 < max(pauses) <= slurm_command.LONGEST_PAUSE_S
    assert len(set(pauses)) == 40


SURROUNDING_JOB = {
    "SLURM_JOB_ID": "5", "SLURM_MEM_PER_CPU": "500", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_NTASKS": "2",
    "SBATCH_PARTITION": "debug", "SBATCH_EXPORT": "NONE", "SQUEUE_PARTITION": "debug", "SUBMITIT_EXECUTOR": "slurm",
    "PMIX_RANK": "0", "PMI_RANK": "0", "MUSTER_ATTEMPT": "3", "CUDA_VISIBLE_DEVICES": "0",
}  # fmt: skip
KEPT = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "big", "PYTHONPATH": "/a", "MUSTER_TEST": "1"}


def test_a_command_gets_nothing_of_a_surrounding_job_or_a_profile(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (SURROUNDING_JOB | KEPT).items():
        monkeypatch.setenv(name, value)
    programs(squeue="set")
    seen = {line.partition("=")[0] for line in slurm.call("squeue").splitlines()}
    assert not seen & SURROUNDING_JOB.keys()
    assert seen >= KEPT.keys()


def test_the_gpus_that_a_user_has_chosen_on_a_login_node_stay() -> None:
    assert slurm_command.clean_environment({"CUDA_VISIBLE_DEVICES": "0"}) == {"CUDA_VISIBLE_DEVICES": "0"}


def test_ids_without_an_answer_are_marked(programs: Programs) -> None:
    folder = programs(squeue=f"echo '{BUSY[0]}' >&2; exit 1", sacct="echo '7|COMPLETED'", scontrol="exit 0")
    jobs = slurm.jobs(["7", "8"])
    assert (jobs["7"].state, jobs["7"].silence, jobs["8"].state) == ("COMPLETED", "", "UNKNOWN")
    assert "Socket timed out" in jobs["8"].silence
    assert not (folder / "scontrol.calls").exists()  # the controller would be as silent to it


def test_a_job_that_has_just_ended_can_be_cancelled(programs: Programs) -> None:
    programs(scancel="echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1")
    slurm.cancel(["7"])


PREEMPTED = {"PreemptTime": "2026-11-29T10:00:00", "Requeue": "1", "Partition": "gpu", "QOS": "(null)"}
BY_PARTITION = "PreemptMode = REQUEUE\nPreemptType = preempt/partition_prio"


@pytest.mark.parametrize(
    ("version", "job", "config", "partition", "expected"),
    [
        ("24.11.5", PREEMPTED, BY_PARTITION, "PreemptMode=REQUEUE", True),
        ("24.11.5", PREEMPTED, BY_PARTITION, "PreemptMode=CANCEL", False),
        ("24.11.5", PREEMPTED, "PreemptMode = REQUEUE\nPreemptType = preempt/qos", "", True),
        ("24.11.5", PREEMPTED | {"QOS": "low"}, "PreemptMode = REQUEUE\nPreemptType = preempt/qos", "", True),
        ("24.11.5", PREEMPTED | {"QOS": "high"}, "PreemptMode = REQUEUE\nPreemptType = preempt/qos", "", False),
        ("24.11.5", PREEMPTED | {"QOS": "none"}, "PreemptMode = REQUEUE\nPreemptType = preempt/qos", "", False),
        ("24.11.5", PREEMPTED | {"Requeue": "0"}, BY_PARTITION, "PreemptMode=REQUEUE", False),
        ("24.11.5", PREEMPTED | {"PreemptTime": "None"}, BY_PARTITION, "PreemptMode=REQUEUE", False),
        ("22.05.8", PREEMPTED, BY_PARTITION, "PreemptMode=REQUEUE", False),
    ],
)
def test_who_requeues_a_preempted_job(
    programs: Programs, version: str, job: dict[str, str], config: str, partition: str, expected: bool
) -> None:
    programs(
        scontrol=f'case "$*" in --version) echo "slurm-wlm {version}";; *config) echo "{config}";; '
        f'*partition*) echo "   State=UP PriorityTier=1 {partition}";; esac',
        sacctmgr='case "$*" in *"qos low"*) echo cluster;; *"qos high"*) echo cancel;; *) exit 1;; esac',
    )
    assert slurm.requeues_by_itself(job) is expected


@pytest.mark.parametrize(
    ("printed", "tasks"),
    [
        ("12", ["12"]),
        ("12_3", ["12_3"]),
        ("12_[3]", ["12_3"]),
        ("12_[0,2-4%2]", ["12_0", "12_2", "12_3", "12_4"]),
        ("12_[0-4:2]", ["12_0", "12_2", "12_4"]),
    ],
)
def test_a_line_about_waiting_tasks_of_an_array_is_one_about_each(printed: str, tasks: list[str]) -> None:
    assert slurm_array.tasks_of(printed) == tasks


def test_tasks_of_an_array_are_known_one_by_one(programs: Programs) -> None:
    folder = programs(squeue="echo '12_1|RUNNING'; echo '12|PENDING'", sacct="echo '12_[2-4%2]|CANCELLED by 0'")
    found = slurm.jobs(["12_1", "12_3"])
    assert {job_id: job.state for job_id, job in found.items()} == {"12_1": "RUNNING", "12_3": "CANCELLED"}
    assert "--array" in (folder / "squeue.calls").read_text().split()


def test_a_task_of_an_array_has_the_id_that_sbatch_knows() -> None:
    inside = {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}
    assert slurm_array.own_id(inside) == "12_0"
    assert slurm_array.own_id({"SLURM_JOB_ID": "14"}) == "14"
    assert slurm_array.own_id({}) is None
