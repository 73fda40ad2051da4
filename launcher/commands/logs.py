"""Print the log of one rank. With --follow, also print new lines until interrupted."""

import argparse
import time

from conf.visible import visible
from launcher.commands.arguments import add_run
from launcher.status import state


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--job", help="default: train, or custom in a run of your own program")
    parser.add_argument("--rank", type=int, default=0, help="default: 0")
    parser.add_argument("--follow", "-f", action="store_true", help="print new lines until interrupted")


def execute(options: argparse.Namespace) -> int:
    path = state.logs(options.run, options.job or state.training_job(options.run), options.rank)
    print(f"==> {path}", flush=True)
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            print(visible(file.read()), end="", flush=True)
            if not options.follow:
                return 0
            time.sleep(0.5)
