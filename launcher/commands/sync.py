"""Send the metrics that W&B or Comet recorded offline. Run it where there is a network."""

import argparse

from launcher.commands.arguments import add_run
from launcher.run_folder import sweep_record
from launcher.sync import sync as send

arguments = add_run


def execute(options: argparse.Namespace) -> int:
    if sweep_record.is_sweep(options.run):
        return max(map(send, sweep_record.runs(options.run)))
    return send(options.run)
