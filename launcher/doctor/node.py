"""Runs the checks of `muster doctor` on a compute node, in the environment of its jobs.

python -m launcher.doctor.node CONFIG SECTION OUT
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from conf import resolve
from conf.files import write_text
from conf.schema_cluster import Resources
from launcher.doctor import examine
from launcher.supervise.allocation import host


def main(arguments: list[str]) -> int:
    """Write what was found to OUT. SECTION is the section of `cluster` with the resources of this job."""
    config_path, section, out = arguments
    config = resolve.load(Path(config_path))
    part: Resources = getattr(config.cluster, section)
    found = [replace(check, found=examine.shown(check.found)) for check in examine.of_node(config, part)]
    write_text(Path(out), json.dumps({"host": host(), "checks": [asdict(check) for check in found]}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
