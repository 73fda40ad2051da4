"""Save a checkpoint at the next training step, and go on training."""

import argparse

from launcher.commands.arguments import add_run
from launcher.status import requests

arguments = add_run


def execute(options: argparse.Namespace) -> int:
    requests.save(options.run)
    print(f"training will save at its next step and go on. The checkpoint appears in {options.run / 'checkpoints'}")
    return 0
