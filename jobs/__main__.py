"""Runs one job without the launcher: `python -m jobs train RUN/config.yaml`, or `torchrun --nproc-per-node N -m jobs train ...`."""

import argparse
import sys

from conf.errors import UserError
from conf.jobs import JOB_KINDS
from jobs import run
from jobs.distributed import logs
from jobs.distributed.rank import rank_and_world_size

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m jobs", description=__doc__)
    parser.add_argument("job", choices=list(JOB_KINDS))
    parser.add_argument("config", help="path of the run's config: RUN/config.yaml")
    options = parser.parse_args()
    rank, world_size = rank_and_world_size()
    logs.set_up(rank if world_size > 1 else None)
    try:
        run(options.job, options.config)
    except UserError as error:
        print(f"jobs: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
