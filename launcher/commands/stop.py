"""Save a checkpoint at the next training step, then end training. Only `resume` starts it again."""

import argparse

from launcher.commands.arguments import add_run
from launcher.status import requests

arguments = add_run


def execute(options: argparse.Namespace) -> int:
    requests.stop(options.run)
    print(f"training will save at its next step and end. To see when it has: muster status {options.run}")
    return 0
