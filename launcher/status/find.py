"""Finds runs: that of a Slurm job by the job's id, and all those below a folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from conf.errors import MusterError, Problem, RunError
from launcher import slurm
from launcher.run_folder import record, sweep_record

FOLDER = "runs"
"""Where runs are looked for that Slurm no longer knows; also the folder that `muster ls` lists."""
DEEPEST = 3
"""Levels of folders in which runs are looked for: RUN, SWEEP/RUN, PROJECT/SWEEP/RUN."""


def run_of(word: Path) -> Path:
    """Return the folder of a run or sweep, given as its path or as the id of one of its jobs. Raises RunError for any other id."""
    job_id = str(word)
    if word.exists() or not record.JOB_ID.fullmatch(job_id):
        return word.resolve()
    job = slurm.jobs([job_id]).get(job_id, slurm.SlurmJob(job_id, "UNKNOWN"))
    for folder in (Path(job.folder), *Path(job.folder).parents) if job.folder else ():
        if (folder / "run.json").is_file():
            return folder
        if sweep_record.is_sweep(folder):
            return _started_by(folder, job_id) or folder
    if found := _started_by(Path(FOLDER).resolve(), job_id):
        return found
    if job.silence:
        raise RunError(
            Problem("RUN", job_id, f"is no folder, and no run below {FOLDER}/ has started this job. {job.silence}")
        )
    where = f"starts in {job.folder}, which is no run" if job.folder else "is not known to Slurm"
    raise RunError(Problem("RUN", job_id, f"is no folder, and the job {where}; no run below {FOLDER}/ has started it"))


def _started_by(folder: Path, job_id: str) -> Path | None:
    """Return the run in `folder`, or below it, that has started a job; the sweep, if it is an array or a job of its best run."""
    sweep = None
    for run in runs_below(folder):
        try:
            ids = record.known_ids(run)
            if job_id in ids:
                return run
            if sweep_record.is_sweep(run.parent):
                arrays = {known.partition("_")[0] for known in ids if "_" in known}
                if job_id in arrays or job_id in sweep_record.jobs(run.parent).values():
                    sweep = run.parent  # unless a run that comes later is the best one
        except (MusterError, OSError):  # a damaged or closed run is not the one
            continue
    return sweep


def runs_below(folder: Path, levels: int = DEEPEST) -> Iterator[Path]:
    """Yield every run in `folder`, or below it, that this user may look into."""
    try:
        is_run = (folder / "run.json").is_file()
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # it is closed, or gone
        return
    if is_run:
        yield folder
        return
    for path in inside if levels else []:
        yield from runs_below(path, levels - 1)


def each_run(folders: Sequence[Path]) -> list[Path]:
    """Return the runs, with those of a sweep that have been started in its place."""
    found: list[Path] = []
    for folder in folders:
        is_sweep = sweep_record.is_sweep(folder)
        found += [run for run in sweep_record.runs(folder) if (run / "run.json").is_file()] if is_sweep else [folder]
    return found
