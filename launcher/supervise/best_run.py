"""Prints the folder of the best run of a sweep: the jobs that start when all trainings have ended ask for it.

Standard library only: in a container job this runs outside the container, with the node's own python3.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import sys
from pathlib import Path

from conf.errors import UserError
from launcher.run_folder import sweep_record


def main(arguments: list[str]) -> int:
    """Print the best run of the sweep in `arguments`, and return the exit code."""
    folder = Path(arguments[0])
    try:
        found = sweep_record.best(folder)
    except UserError as error:
        print(f"muster: {error}", file=sys.stderr)
        return error.exit_code
    if found is None:
        print(f"muster: no training of {folder} has completed, so there is no best one", file=sys.stderr)
        return 2
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
