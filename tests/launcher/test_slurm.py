"""launcher/slurm.py on small programs that print the output of Slurm's commands."""

import pytest

from launcher import slurm
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
    assert slurm.states(["7", "8"]) == expected


def test_later_commands_get_only_unknown_jobs(programs: Programs) -> None:
    folder = programs(squeue="echo '7|RUNNING'", sacct="echo '8|COMPLETED'", scontrol="exit 1")
    slurm.states(["7", "8"])
    assert "--jobs 8\n" in (folder / "sacct.calls").read_text()
    assert not (folder / "scontrol.calls").exists()


def test_without_jobs_no_command_is_called(programs: Programs) -> None:
    folder = programs(squeue="exit 0", sacct="exit 0", scontrol="exit 0")
    assert slurm.states([]) == {}
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


def test_hostnames_keep_the_order_of_the_ranks(programs: Programs) -> None:
    folder = programs(scontrol="echo n10; echo n2; echo n1")
    assert slurm.hostnames("n[10,2,1]") == ["n10", "n2", "n1"]
    assert (folder / "scontrol.calls").read_text() == "show hostnames n[10,2,1]\n"


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
