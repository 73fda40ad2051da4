"""Show what the jobs of a run or sweep had and used: GPUs, CPUs, memory, time in the queue, time lost to restarts."""

import argparse
import json
import sys
from dataclasses import asdict

from conf.visible import visible
from launcher.commands.arguments import add_json, add_run
from launcher.status import efficiency, efficiency_table, find


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, by_id=True)
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    found, notes = efficiency.report(find.each_run([options.run]))
    if options.json:
        print(json.dumps([{"run": str(run)} | asdict(job) for run, jobs in found.items() for job in jobs], indent=2))
    else:
        efficiency_table.show(found)
    for note in notes:
        print(visible(f"note: {note}"), file=sys.stderr if options.json else sys.stdout)
    return 0
