"""Submits a sweep to Slurm: the jobs before training once, the trainings as an array, the later jobs of the best run or of each."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from conf.files import write_text
from conf.jobs import AFTER_TRAINING, BEFORE_TRAINING, JOB_KINDS
from conf.plural import plural
from conf.visible import visible
from launcher import slurm
from launcher.plan import Job
from launcher.run_folder import record, sweep_record
from launcher.submit import sbatch, submit, sweep_groups, sweep_scripts
from launcher.submit.planned_run import PlannedRun

Ids = dict[Path, dict[str, str]]
"""By the folder of a run: the ids of its jobs, by name."""


def submit_all(folder: Path, runs: Sequence[PlannedRun], command: Sequence[str]) -> int:
    """Submit every job of the sweep. Raises SiteError if Slurm refuses one: those before it are then cancelled."""
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    submitted: dict[str, str] = {}
    with ExitStack() as held:
        for run in runs:
            held.enter_context(submit.opened(run.config))
        paths = {run.folder: submit.write_run_folder(run.config, run.jobs, command) for run in runs if run.jobs}
        try:
            _Submission(folder, runs, paths, submitted).run()
        except slurm.SlurmError as error:
            raise submit.not_submitted(runs[0].config, "a job", error, submitted) from None
        except KeyboardInterrupt:  # half a sweep would be of no use
            if cancelled := submit.cancel_submitted(submitted):
                print(cancelled.removeprefix("; "), file=sys.stderr, flush=True)
            raise
    return 0


class _Submission:
    """Submits the jobs of a sweep in the order in which they depend on each other."""

    def __init__(
        self, folder: Path, runs: Sequence[PlannedRun], paths: Mapping[Path, Path], submitted: dict[str, str]
    ) -> None:
        """`paths`: the config file of each run. `submitted` gets the id of each job, under a name for messages."""
        self.folder, self.runs, self.paths, self.submitted = folder, runs, paths, submitted
        self.owners = sweep_groups.owners(runs)
        self.ids: Ids = {run.folder: {} for run in runs}

    def run(self) -> None:
        for run in self.runs:
            self._prepare(run)
        arrays = [self._array(number, group) for number, group in enumerate(sweep_groups.arrays(self.runs), 1)]
        if arrays and sweep_groups.merges_best(self.runs):
            self._best(arrays)
            return
        for run in self.runs:
            for job in run.jobs:
                if job.name in AFTER_TRAINING:
                    self._one(run, job)

    def _prepare(self, run: PlannedRun) -> None:
        """Submit the jobs before training, unless they are those of another run too."""
        owner = self.owners[run.folder]
        if owner is run:
            for job in run.jobs:
                if job.name in BEFORE_TRAINING:
                    self._one(run, job)
        self.ids[run.folder] |= self.ids[owner.folder]

    def _one(self, run: PlannedRun, job: Job) -> None:
        own = self.ids[run.folder]
        own[job.name] = submit.submit_job(
            run.config, job, self.paths[run.folder], [own[name] for name in job.after if name in own]
        )
        self.submitted[f"{job.name} of {run.folder.name}"] = own[job.name]
        print(visible(f"submitted {job.name:<12} {own[job.name]:<8} {run.folder.name}"), flush=True)

    def _array(self, number: int, group: Sequence[PlannedRun]) -> str:
        """Submit one array, and record its tasks as the runs' trainings. Returns its id."""
        name, text = array_script(self.folder, group, self.owners, self.ids)
        job_id = self._sbatch(_file_name(name, number), name, text)
        print(f"submitted {name:<12} {job_id:<8} array of {plural(len(group), 'run')}", flush=True)
        for task, run in enumerate(group):
            own_id = self.ids[run.folder][name] = f"{job_id}_{task}"
            record.add_job(run.folder, name, own_id, sweep_scripts.job_name(self.folder, name), "..")
        return job_id

    def _best(self, arrays: Sequence[str]) -> None:
        """Submit the jobs of the best run, which is known when all trainings have ended."""
        later: dict[str, str] = {}
        for name in sweep_groups.later_names(self.runs):
            dependency = sweep_groups.after_all(name, arrays, later)
            first = sweep_groups.first_with(self.runs, name)
            text = sweep_scripts.best_run_text(self.folder, name, first, dependency)
            later[name] = self._sbatch(name, name, text)
            sweep_record.set_jobs(self.folder, later)
            print(f"submitted {name:<12} {later[name]:<8} the best run", flush=True)

    def _sbatch(self, file_name: str, name: str, text: str) -> str:
        """Write a script of the sweep and submit it. Returns the id of the job."""
        script, wanted = self.folder / "jobs" / f"{file_name}.sbatch", sweep_scripts.job_name(self.folder, name)
        write_text(script, text)
        earlier = {job_id.partition("_")[0] for run in self.runs for job_id in record.known_ids(run.folder)}
        earlier |= set(sweep_record.jobs(self.folder).values())

        def is_ours(seen: slurm.SlurmJob) -> bool:
            is_new = seen.job_id.partition("_")[0] not in earlier
            return is_new and seen.name == wanted and seen.folder == str(self.folder)

        job_id = sbatch.submit(script, is_ours)
        self.submitted[f"{file_name} of the sweep"] = job_id
        return job_id


def array_script(
    folder: Path, group: Sequence[PlannedRun], owners: Mapping[Path, PlannedRun], ids: Ids
) -> tuple[str, str]:
    """(name of the job, script) of an array. It waits until the jobs before it have completed.

    If there are several sets of these, it waits until they have ended: rows that could not be prepared stop only their own runs.
    """
    assert group[0].training
    sets = (tuple(job_id for job, job_id in ids[run.folder].items() if job in BEFORE_TRAINING) for run in group)
    needed = [*dict.fromkeys(filter(None, sets))]
    condition = "afterok" if len(needed) == 1 else "afterany"
    each = dict.fromkeys(job_id for listed in needed for job_id in listed)
    tasks = [(run, owners[run.folder].folder / "data" if run.job("preprocess") else None) for run in group]
    dependency = f"{condition}:{':'.join(each)}" if each else None
    name = group[0].training.name
    return name, sweep_scripts.array_text(folder, name, tasks, dependency)


def scripts(folder: Path, runs: Sequence[PlannedRun]) -> Iterator[tuple[str, str]]:
    """(name, text) of each script of the sweep, for a preview. Names in angle brackets stand for the ids."""
    owners = sweep_groups.owners(runs)
    numbers = {folder: number for number, folder in enumerate(dict.fromkeys(run.folder for run in owners.values()), 1)}
    ids: Ids = {}
    for run in runs:
        owner = owners[run.folder]
        names = [job.name for job in owner.jobs if job.name in BEFORE_TRAINING]
        ids[run.folder] = {name: f"<{_file_name(name, numbers[owner.folder])}>" for name in names}
    groups = sweep_groups.arrays(runs)
    for number, group in enumerate(groups, 1):
        name, text = array_script(folder, group, owners, ids)
        yield _file_name(name, number), text
    if groups and sweep_groups.merges_best(runs):
        trainings = [f"<{_file_name('train', number)}>" for number, _ in enumerate(groups, 1)]
        later = {name: f"<{name}>" for name in JOB_KINDS}
        for name in sweep_groups.later_names(runs):
            dependency = sweep_groups.after_all(name, trainings, later)
            yield name, sweep_scripts.best_run_text(folder, name, sweep_groups.first_with(runs, name), dependency)


def _file_name(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"
