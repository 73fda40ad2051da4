"""`python -m launcher status|logs|why|stop|cancel|resume|merge RUN`: everything one asks of a run once it has been started."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from conf.errors import UserError
from launcher import slurm
from launcher.paths import CLONE
from launcher.status import state, tables


def status(options: argparse.Namespace) -> int:
    """Every job with its state, step and verdict; exit code 1 when a job has failed."""
    jobs = state.job_states(options.run)
    tables.status(jobs)
    return 1 if any(job.failed for job in jobs) else 0


def logs(options: argparse.Namespace) -> int:
    """The log of one rank; --follow goes on until interrupted."""
    path = state.logs(options.run, options.job, options.rank)
    print(f"==> {path}", flush=True)
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            print(file.read(), end="", flush=True)
            if not options.follow:
                return 0
            time.sleep(0.5)


def why(options: argparse.Namespace) -> int:
    """Why each job waits, or how it failed: the first rank's words, what helps, and what comes next."""
    for job in state.job_states(options.run):
        if job.state == "PENDING":
            reason, start = slurm.pending_reason(job.job_id)
            print(f"{job.name} {job.job_id} waits: {reason}; may start {start}")
        elif job.verdict is None or job.verdict["status"] == "completed":
            print(f"{job.name} {job.job_id} {job.verdict['status'] if job.verdict else job.state.lower()}")
        tables.attempts(job)
    return 0


def stop(options: argparse.Namespace) -> int:
    """Let training save and end at its next step; it does not start again until `resume`."""
    state.stop(options.run)
    print("training will save at its next step and end; python -m launcher status shows when it has")
    return 0


def cancel(options: argparse.Namespace) -> int:
    """End every job of the run that waits or runs."""
    print(f"cancelled {len(state.cancel(options.run))} jobs")
    return 0


def resume(options: argparse.Namespace) -> int:
    """Start what is left of the run."""
    return _launch(options, [])


def merge(options: argparse.Namespace) -> int:
    """Consolidate the newest checkpoint into RUN/model."""
    return _launch(options, ["pipeline=consolidate"])


def _launch(options: argparse.Namespace, words: list[str]) -> int:
    return subprocess.call(
        [sys.executable, str(CLONE / "launch.py"), f"resume={options.run}", *words, *options.overrides]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (status, logs, why, stop, cancel, resume, merge):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
        sub.set_defaults(command=command)
        if command is logs:
            sub.add_argument("--job", default="train")
            sub.add_argument("--rank", type=int, default=0)
            sub.add_argument("--follow", "-f", action="store_true")
        if command in (resume, merge):
            sub.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch.py")
    options = parser.parse_args()
    options.run = options.run.resolve()
    try:
        return int(options.command(options))
    except (UserError, slurm.SlurmError) as error:
        print(f"launcher: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
