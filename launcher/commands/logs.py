"""Print the log of one rank or of all. With --follow, also print new lines until the job ends."""

import argparse
import shlex

from conf.errors import Problem, RunError
from launcher.commands.arguments import add_run
from launcher.run_folder import sweep_record
from launcher.status import state
from launcher.status.follow import End, Follower


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, by_id=True)
    parser.add_argument("--job", help="default: train, or custom in a run of your own program")
    parser.add_argument("--rank", type=_rank, default=0, metavar="RANK", help="a rank, or `all`; default: 0")
    parser.add_argument(
        "--follow", "-f", action="store_true", help="print new lines, also of new attempts, until the job ends"
    )
    parser.add_argument("--time", action="store_true", help="put a time before each line that has none")


def execute(options: argparse.Namespace) -> int:
    if sweep_record.is_sweep(options.run):
        names = "\n".join(f"  muster logs {shlex.quote(str(run))}" for run in sweep_record.runs(options.run))
        raise RunError(Problem("RUN", options.run, f"is a sweep. Name one of its runs:\n{names}"))
    job = options.job or state.training_job(options.run)
    logs = Follower(options.run, job, options.rank, options.time)
    if options.follow:
        logs.follow(End(options.run, job))
    else:
        logs.show()
    return 0


def _rank(text: str) -> int | None:
    """Read a rank; None stands for all of them."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor `all`")
    return int(text)
