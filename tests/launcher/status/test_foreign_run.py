"""`muster status`, `why`, `logs` and `resume` of a run that somebody else wrote: no program is run, nothing crashes."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from conf import resolve
from conf.errors import ConfigError, RunError
from launcher import __main__ as muster
from launcher.run_folder import attempts, record
from tests.conftest import Programs

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**70, 1.5, "", "x", "../..", "--user=root", "-1", "1;id", "a\nb", "\x1b]0;x\x07", [], {}, [[]], {"a": []},
    "x" * 5000, float("nan"), 1e300, "\ud800", "[bold", "[/]", "$(touch CANARY)",
)  # fmt: skip
VERDICT = {"status": "failed", "reason": "no rows", "rank": 1, "host": "n1", "step": 3, "exit": 1, "error": "Traceback",
           "started": 1.0, "ended": 9.0, "log": "a\nb", "remedy": "Try", "next": "requeued", "job_id": "7", "saved": 1,
           "requeued": True}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    folder = run / "jobs/train"
    for number in (1, 2):
        (folder / f"attempt-{number}").mkdir(parents=True)
        (folder / f"attempt-{number}.json").write_text(json.dumps(VERDICT))
        (folder / f"attempt-{number}/begin.json").write_text(json.dumps({"job_id": "7", "host": "n1", "started": 1.0}))
    beat = {"phase": "train", "count": 3, "time": 1.0, "rank": 0, "pid": 1, "step": 3, "host": "n1"}
    (folder / "attempt-2/node-0.json").write_text(json.dumps({"ranks": {"0": beat}}))
    launch = {"command": ["launch.py"], "time": "now", "cluster": "slurm", "python": "3.11", "jobs": {"train": "7"}}
    (run / "run.json").write_text(json.dumps({"launches": [launch]}))
    (run / "metrics.jsonl").write_text(
        '{"step": 3, "loss": 2.0, "tokens_per_s": 1.0, "seconds": 2.0, "mfu": 0.4, "left_s": 60, "steps": 9, "time": 1.0}\n'
    )
    return run


def change(path: Path, rng: random.Random) -> None:
    """Put something else into one place of a JSON file, or damage its bytes."""
    if rng.random() < 0.3:
        data = bytearray(path.read_bytes())
        place = rng.randrange(len(data))
        data[place : place + rng.choice((1, 4, 1000))] = rng.randbytes(rng.choice((0, 1, 4)))
        path.write_bytes(bytes(data))
        return
    content = json.loads(path.read_text())
    spots: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            spots.append((value, key))
            collect(value[key])

    collect(content)
    holder, key = rng.choice(spots)
    if isinstance(holder, dict) and rng.random() < 0.3:
        value = holder.pop(key)
        if rng.random() < 0.5:
            holder[str(rng.choice(VALUES))] = value
    else:
        holder[key] = rng.choice(VALUES)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("count", [120, pytest.param(3000, marks=pytest.mark.proof)])
def test_damaged_records_are_shown_or_refused(
    run: Path, tmp_path: Path, programs: Programs, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    folder = programs(squeue="echo '7|RUNNING'", sacct="", scontrol="", scancel="")
    (run / "config.yaml").write_text("jobs: [train]\n")
    kept = tmp_path / "kept"
    shutil.copytree(run, kept)
    for number in range(count):
        rng = random.Random(number)
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        path = rng.choice(sorted(item for item in run.rglob("*.json*") if item.is_file()))
        change(path, rng)
        for command in ("status", "why", "cancel", "ls", *(() if number % 4 else ("efficiency",))):
            code = muster.main([command, str(run)])
            assert code in (0, 1, 2), f"{number} {path}"
        assert "Traceback (most" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("CANARY"))
    calls = "".join(path.read_text() for path in folder.glob("*.calls"))
    assert "--user=root" not in calls
    assert "1;id" not in calls


@pytest.mark.site(
    case="the run.json of somebody else names an option as a job id: --user=you",
    before="`muster cancel` gave it to scancel, which ended all your jobs",
    after="the record is refused",
)
@pytest.mark.parametrize("job_id", ["--user=me", "-u", "7 8", "7,8", "", "x", 7, None, "7\n"])
def test_a_job_id_is_a_number(run: Path, programs: Programs, job_id: object) -> None:
    folder = programs(squeue="echo '7|RUNNING'", sacct="", scancel="")
    content = json.loads((run / "run.json").read_text())
    content["launches"][0]["jobs"]["train"] = job_id
    (run / "run.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="damaged, or that Muster did not write"):
        record.newest_jobs(run)
    assert muster.main(["cancel", str(run)]) == 2
    assert not (folder / "scancel.calls").exists()


@pytest.mark.parametrize("slurm", [None, [], {"train": None}, {"train": {"slurm_name": 1, "folder": "code", "x": 2}}])
def test_names_that_muster_did_not_write_are_left_out(run: Path, slurm: object) -> None:
    content = json.loads((run / "run.json").read_text())
    content["launches"][0]["slurm"] = slurm
    (run / "run.json").write_text(json.dumps(content))
    job = record.newest_jobs(run)["train"]
    assert (job.slurm_name, job.folder) == ("", "code")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"launches": 1}', '{"launches": [1]}', '{"launches": [{"jobs": []}]}', "\x00", "[" * 9999]
)
def test_a_record_of_launches_that_is_none_is_refused(run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    assert muster.main(["status", str(run)]) == 2


def test_names_that_are_no_attempts_are_left_out(run: Path) -> None:
    folder = run / "jobs/train"
    for name in ("attempt-x", "attempt-", "attempt-3 4", "attempt-99999999999999999999", "attempt-²"):
        (folder / name).mkdir()
        (folder / f"{name}.json").write_text("{}")
    assert attempts.newest_attempt(folder) == 2
    assert [verdict["attempt"] for verdict in attempts.verdicts(folder)] == [1, 2]


def test_a_damaged_verdict_is_shown_as_one(run: Path) -> None:
    (run / "jobs/train/attempt-2.json").write_text("[]")
    verdict = attempts.last_verdict(run / "jobs/train")
    assert verdict is not None
    assert (verdict["status"], verdict["reason"]) == ("failed", "attempt-2.json is damaged")


@pytest.mark.parametrize(
    "text", ["[]", "a: [", "\x00", "!!python/object/apply:os.system ['touch CANARY']", "a: !!python/name:os.system", ""]
)
def test_a_stored_config_runs_nothing(run: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError):
        resolve.load(run / "config.yaml")
    assert not list(tmp_path.rglob("CANARY"))
