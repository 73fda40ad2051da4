"""Show what the jobs of a run had and used: GPUs, CPUs, memory, time in the queue, time lost to restarts."""

import argparse
import json
from dataclasses import asdict

from launcher.commands.arguments import add_json, add_run
from launcher.status import efficiency, efficiency_table


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, by_id=True)
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    found = efficiency.read(options.run)
    if options.json:
        print(json.dumps([asdict(job) for job in found], indent=2))
    else:
        efficiency_table.show(found)
    return 0
