"""Finds the run of a Slurm job by the job's id."""

from collections.abc import Iterator
from pathlib import Path

from conf.errors import MusterError, Problem, RunError
from launcher import slurm
from launcher.run_folder import record

FOLDER = "runs"
"""Where runs are looked for that Slurm no longer knows; also the folder that `muster ls` lists."""
DEEPEST = 3
"""Levels of folders in which runs are looked for: RUN, SWEEP/RUN, PROJECT/SWEEP/RUN."""


def run_of(word: Path) -> Path:
    """Return the folder of a run, given as its path or as the id of one of its jobs. Raises RunError for an id of no run."""
    job_id = str(word)
    if word.exists() or not record.JOB_ID.fullmatch(job_id):
        return word.resolve()
    job = slurm.jobs([job_id]).get(job_id, slurm.SlurmJob(job_id, "UNKNOWN"))
    for folder in (Path(job.folder), *Path(job.folder).parents) if job.folder else ():
        if (folder / "run.json").is_file():
            return folder
    for run in runs_below(Path(FOLDER).resolve()):
        try:
            if job_id in record.known_ids(run):
                return run
        except (MusterError, OSError):  # a damaged or closed run is not the one
            continue
    where = f"starts in {job.folder}, which is no run" if job.folder else job.silence or "is not known to Slurm"
    raise RunError(Problem("RUN", job_id, f"is no folder, and the job {where}; no run below {FOLDER}/ has started it"))


def runs_below(folder: Path, levels: int = DEEPEST) -> Iterator[Path]:
    """Yield every run in `folder`, or below it."""
    if (folder / "run.json").is_file():
        yield folder
        return
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return
    for path in inside if levels else []:
        yield from runs_below(path, levels - 1)
