"""The command `muster`: `muster run KEY=VALUE...` launches a run, others show or change it. `python -m launcher` is the same."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from conf.errors import UserError
from conf.plural import plural
from conf.visible import visible
from launcher import slurm, version
from launcher.paths import CLONE
from launcher.run_folder import lock, record
from launcher.status import listing, pending, state, tables

WAIT_S = 120.0
"""How long a command waits in all for a Slurm that is busy. A launch waits longer: see launch.py."""


def ls(options: argparse.Namespace) -> int:
    """List the runs below a folder: state, step, loss, time left."""
    folder = options.folder.resolve()
    found = listing.summaries(folder)
    if options.json:
        print(json.dumps([asdict(item) | {"run": str(item.run)} for item in found], indent=2))
    elif found:
        tables.runs(found, folder)
    else:
        print(f"no run in {visible(str(folder))}")
    return 0


def status(options: argparse.Namespace) -> int:
    """Show every job of a run: state, step, verdict and last error. Exits with 1 when a job has failed."""
    jobs = state.job_states(options.run)
    waits = pending.reasons(jobs)
    if options.json:
        print(
            json.dumps(
                [asdict(job) | {"failed": job.failed, "waits_for": waits.get(job.name)} for job in jobs], indent=2
            )
        )
    else:
        tables.status(jobs, waits)
    return _exit_code(options, jobs) or (1 if any(job.failed for job in jobs) else 0)


def wait(options: argparse.Namespace) -> int:
    """Wait until no job of the run is pending or running. Exits with 0 if all have completed, else with 1."""
    said: set[str] = set()
    while True:
        jobs = state.job_states(options.run)
        is_silent = any("does not answer" in job.note for job in jobs)
        is_live = any(job.state in slurm.LIVE_STATES for job in jobs) or lock.holder(options.run) is not None
        for job in jobs:
            if job.verdict and job.state not in slurm.LIVE_STATES and job.name not in said:
                print(visible(f"{job.name} {job.job_id} {job.verdict['status']}"), flush=True)
                said.add(job.name)
        if not (is_live or is_silent):
            return 0 if jobs and all(job.verdict and not job.failed for job in jobs) else 1
        time.sleep(options.every)


def logs(options: argparse.Namespace) -> int:
    """Print the log of one rank. With --follow, also print new lines until interrupted."""
    path = state.logs(options.run, options.job or state.training_job(options.run), options.rank)
    print(f"==> {path}", flush=True)
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            print(visible(file.read()), end="", flush=True)
            if not options.follow:
                return 0
            time.sleep(0.5)


def why(options: argparse.Namespace) -> int:
    """Show why each job waits or how it failed: the first error, the remedy, and what happens next."""
    jobs = state.job_states(options.run)
    waits = pending.reasons(jobs)
    for job in jobs:
        if job.state == "PENDING":
            print(visible(f"{job.name} {job.job_id} pending: {waits.get(job.name, 'Slurm does not say why')}"))
        elif job.verdict is None or job.verdict["status"] == "completed":
            print(f"{job.name} {job.job_id} {job.verdict['status'] if job.verdict else job.state.lower()}")
        tables.attempts(job)
    return _exit_code(options, jobs)


def stop(options: argparse.Namespace) -> int:
    """Save a checkpoint at the next training step, then end training. Only `resume` starts it again."""
    state.stop(options.run)
    print(f"training will save at its next step and end. To see when it has: muster status {options.run}")
    return 0


def cancel(options: argparse.Namespace) -> int:
    """End every pending and running job of the run, without saving."""
    print(f"cancelled {plural(len(state.cancel(options.run)), 'job')}")
    return 0


def _exit_code(options: argparse.Namespace, jobs: Sequence[state.JobState]) -> int:
    """Print why the state of a job is unknown. Returns 2 if Slurm did not answer, else 0."""
    notes = {job.note: job for job in jobs if job.note}
    for note, job in notes.items():
        print(f"{options.prog}: {job.name}: state unknown: {note}", file=sys.stderr)
    return 2 if any("does not answer" in note for note in notes) else 0


def resume(options: argparse.Namespace) -> int:
    """Start the jobs that have not completed. Training continues from the newest complete checkpoint."""
    return run([f"resume={options.run}", *options.overrides], prog=f"{options.prog} resume")


def merge(options: argparse.Namespace) -> int:
    """Consolidate the newest checkpoint into RUN/model. For an older one: consolidate.step=500."""
    return run([f"resume={options.run}", "pipeline=consolidate", *options.overrides], prog=f"{options.prog} merge")


def sync(options: argparse.Namespace) -> int:
    """Send the metrics that W&B or Comet recorded offline. Run it where there is a network."""
    from launcher.sync import sync as send

    return send(options.run)


def push(options: argparse.Namespace) -> int:
    """Push the consolidated model to the Hub: hub.push=owner/name, if the run has none. Run it where there is a network."""
    return run([f"resume={options.run}", "pipeline=push", *options.overrides], prog=f"{options.prog} push")


def import_config(options: argparse.Namespace) -> int:
    """Turn a config of Axolotl, LLaMA-Factory, TRL or ms-swift into an experiment, and say what becomes of each key."""
    from launcher.convert import command

    return command.run(options.file, options.program, options.out, options.gpus, force=options.force)


def run(arguments: Sequence[str], prog: str) -> int:
    """Launch a run. Hydra reads all arguments, also --help."""
    import launch  # imports Hydra and submitit; the other commands start faster without them

    return launch.main(arguments, prog)


PROGRAMS = ("axolotl", "llamafactory", "trl", "ms-swift")
RUN_COMMANDS: tuple[Callable[[argparse.Namespace], int], ...] = (
    status,
    wait,
    logs,
    why,
    stop,
    cancel,
    resume,
    merge,
    push,
    sync,
)
"""Commands whose first argument is a run's folder."""


def parser(prog: str) -> argparse.ArgumentParser:
    """The parser of every command but `run`, whose arguments are Hydra's."""
    result = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune an LLM on a SLURM cluster: launch, watch, stop, resume and merge runs.",
        epilog=f"`{prog} run --help` lists the config groups; `{prog} COMMAND --help` explains a command.",
    )
    result.add_argument("--version", action="version", version=version.text(CLONE))
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    launching = commands.add_parser(
        "run",
        help="Launch a run with the settings KEY=VALUE..., like launch.py. Without arguments: the demo on this machine.",
    )
    launching.set_defaults(command=run)
    importing = commands.add_parser("import", help=import_config.__doc__, description=import_config.__doc__)
    importing.add_argument("file", type=Path, metavar="FILE", help="YAML or JSON of the other program")
    importing.add_argument(
        "--as", dest="program", choices=PROGRAMS, help="the program; default: recognized by its keys"
    )
    importing.add_argument("--out", type=Path, metavar="FILE.yaml", help="default: conf/experiment/NAME.yaml of Muster")
    importing.add_argument("--gpus", type=int, default=8, help="GPUs that its batch size is meant for; default: 8")
    importing.add_argument("--force", action="store_true", help="overwrite an experiment of that name")
    importing.set_defaults(command=import_config)
    lists = commands.add_parser("ls", help=ls.__doc__, description=ls.__doc__)
    lists.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="default: runs")
    lists.add_argument("--json", action="store_true", help="print everything that is known, for scripts")
    lists.set_defaults(command=ls)
    for command in RUN_COMMANDS:
        sub = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        sub.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
        sub.set_defaults(command=command, prog=prog)
        if command is status:
            sub.add_argument("--json", action="store_true", help="print everything that is known, for scripts")
        if command is wait:
            sub.add_argument(
                "--every", type=float, default=10.0, metavar="SECONDS", help="how often to ask Slurm; default: 10"
            )
        if command is logs:
            sub.add_argument("--job", help="default: train, or custom in a run of your own program")
            sub.add_argument("--rank", type=int, default=0, help="default: 0")
            sub.add_argument("--follow", "-f", action="store_true", help="print new lines until interrupted")
        if command in (resume, merge, push):
            sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, as for `run`")
    return result


def main(arguments: Sequence[str] | None = None, prog: str = "python -m launcher") -> int:
    """Run one command and return its exit code: 2 for a user's error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:
        return run(words[1:], prog=f"{prog} run")
    if words and "=" in words[0]:
        print(f"{prog}: {words[0]} is not a command; to launch a run: {prog} run {' '.join(words)}", file=sys.stderr)
        return 2
    options = parser(prog).parse_args(words)
    if "run" in options:
        options.run = options.run.resolve()
    try:
        with slurm.retrying(WAIT_S):
            return int(options.command(options))
    except slurm.BusyError as error:
        print(f"{prog}: Slurm does not answer ({error}), so nothing was changed. Try again later", file=sys.stderr)
        return 2
    except (UserError, slurm.SlurmError) as error:
        print(f"{prog}: {visible(str(error))}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"{prog}: {record.closed_file(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `muster logs RUN | head`: the reader has closed the pipe
        return 141
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
