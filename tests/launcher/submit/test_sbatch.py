"""launcher/submit/sbatch.py on small programs: the id among a site's lines, refusals, and answers that never come."""

from pathlib import Path

import pytest

from launcher import slurm, slurm_command
from launcher.submit import sbatch
from tests.conftest import Programs
from tests.launcher.test_slurm import BUSY, fails_first


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds."""
    monkeypatch.setattr(slurm_command, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(sbatch, "SETTLE_S", 0.01)


BANNER = "--> This is job 3 of at most 50 in the queue...OK"


@pytest.mark.site(
    case="sbatch prints a banner, checks or the cluster's name around the job id",
    before="a number in the banner was taken for the job id",
    after="only the line with the id is read",
)
@pytest.mark.parametrize(
    ("printed", "job_id"),
    [
        ("Submitted batch job 12", "12"),
        ("Submitted batch job 12 on cluster big", "12"),
        (f"Welcome 2026\n{BANNER}\nSubmitted batch job 12\nGood luck with job 4", "12"),
        (f"{BANNER}\n12;big", "12"),
        (f"{BANNER}\n12", "12"),
        (BANNER, None),
        ("", None),
    ],
)
def test_the_id_is_found_in_what_sbatch_prints(printed: str, job_id: str | None) -> None:
    assert sbatch.submitted_id(printed) == job_id


@pytest.mark.site(
    case="A job_submit plugin prints notices, and refuses a job with a reason of its own",
    before="the notice of a maintenance was shown as the reason",
    after="Slurm's own reason is shown; where it says nothing, all that the plugin printed",
)
@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            ["sbatch: error: NOTICE: maintenance", "sbatch: error: Batch job submission failed: Invalid qos"],
            "sbatch: error: Batch job submission failed: Invalid qos",
        ),
        (
            [
                "sbatch: error: NOTICE: maintenance",
                "sbatch: error: No account given. Use -A proj1",
                "sbatch: error: Batch job submission failed: Unspecified error",
            ],
            "sbatch: error: Batch job submission failed: Unspecified error | NOTICE: maintenance | "
            "No account given. Use -A proj1",
        ),
    ],
)
def test_the_reason_of_a_refusal(programs: Programs, tmp_path: Path, lines: list[str], reason: str) -> None:
    programs(sbatch="; ".join(f"echo '{line}' >&2" for line in lines) + "; exit 1")
    with pytest.raises(slurm.SlurmError) as raised:
        sbatch.submit(tmp_path / "script.sh", lambda job: False)
    assert str(raised.value) == reason


def test_notices_of_an_accepted_job_are_shown(
    programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(sbatch="echo 'sbatch: NOTICE: maintenance' >&2; echo 'Submitted batch job 7'")
    assert sbatch.submit(tmp_path / "script.sh", lambda job: False) == "7"
    assert "NOTICE: maintenance" in capsys.readouterr().err


TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


@pytest.mark.site(
    case="sbatch times out, but the controller has queued the job",
    before="the job ran without the launch knowing it; launching again started a second training",
    after="the launch finds the job by its script and takes it; sbatch runs again only if the job is not queued",
)
@pytest.mark.parametrize("queued", [True, False], ids=["queued", "lost"])
def test_a_submission_without_an_answer_is_neither_lost_nor_repeated(
    programs: Programs, tmp_path: Path, quick: None, queued: bool
) -> None:
    script = tmp_path / "script.sh"
    lines = ["/another/script.sh|6|RUNNING|me|a/train|/runs/b/code"]
    lines += [f"{script}|7|PENDING|me|a/train|/runs/a/code"] if queued else []
    folder = programs(
        sbatch=fails_first(tmp_path, 1, TIMED_OUT, "echo 'Submitted batch job 8'"),
        squeue="\n".join(f"echo '{line}'" for line in lines),
    )
    with slurm.retrying(60):
        assert sbatch.submit(script, lambda job: False) == ("7" if queued else "8")
    assert len((folder / "sbatch.calls").read_text().splitlines()) == (1 if queued else 2)


def test_a_job_that_shows_up_late_is_cancelled(programs: Programs, tmp_path: Path, quick: None) -> None:
    """A very slow controller queues the first request after sbatch has been called again."""
    script = tmp_path / "script.sh"
    late = f'[ ! -e "{tmp_path}/late" ] || {{ echo "{script}|7|PENDING"; echo "{script}|8|PENDING"; }}'
    folder = programs(
        sbatch=fails_first(tmp_path, 1, TIMED_OUT, f": > '{tmp_path}/late'; echo 'Submitted batch job 8'"),
        squeue=late,
        scancel="exit 0",
    )
    with slurm.retrying(60):
        assert sbatch.submit(script, lambda job: False) == "8"
    assert (folder / "scancel.calls").read_text() == "7\n"


def test_the_tasks_of_an_array_are_one_job(programs: Programs, tmp_path: Path, quick: None) -> None:
    script = tmp_path / "script.sh"
    programs(
        sbatch=f"echo '{TIMED_OUT}' >&2; exit 1",
        squeue="\n".join(f"echo '{script}|{job}|PENDING'" for job in ("12_0", "12_1")),
    )
    with slurm.retrying(60):
        assert sbatch.submit(script, lambda job: False) == "12"


def test_a_submission_that_stays_open_says_how_to_look(programs: Programs, tmp_path: Path, quick: None) -> None:
    programs(sbatch=f"echo '{TIMED_OUT}' >&2; exit 1", squeue=f"echo '{BUSY[0]}' >&2; exit 1")
    with slurm.retrying(0.2), pytest.raises(slurm.BusyError, match="may be queued for all that: look with squeue --me"):
        sbatch.submit(tmp_path / "script.sh", lambda job: False)


def test_the_job_of_a_copied_script_is_recognized(programs: Programs, tmp_path: Path, quick: None) -> None:
    """A site's sbatch may submit a copy, so that Slurm shows another path."""
    programs(
        sbatch=f"echo '{TIMED_OUT}' >&2; exit 1",
        squeue="echo '/var/spool/copy.sh|9|PENDING|me|a|b/train|/runs/with | bar/code'",
    )
    with slurm.retrying(60):
        found = sbatch.submit(
            tmp_path / "script.sh", lambda job: (job.name, job.folder) == ("a|b/train", "/runs/with | bar/code")
        )
    assert found == "9"
