"""Send the metrics that W&B or Comet recorded offline. Run it where there is a network."""

import argparse

from launcher.commands.arguments import add_run
from launcher.sync import sync as send

arguments = add_run


def execute(options: argparse.Namespace) -> int:
    return send(options.run)
