"""One run of a sweep, and the jobs of it that are to be started."""

from pathlib import Path
from typing import NamedTuple

from conf.jobs import RESUMABLE
from conf.schema import Config
from launcher.plan import Job


class SweepRun(NamedTuple):
    """One run of a sweep, and the jobs of it that are to be started."""

    config: Config
    jobs: list[Job]

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def training(self) -> Job | None:
        """The job that trains, if it is to be started."""
        return next((job for job in self.jobs if job.name in RESUMABLE), None)

    def job(self, name: str) -> Job | None:
        """The job of a name, if it is to be started."""
        return next((job for job in self.jobs if job.name == name), None)
