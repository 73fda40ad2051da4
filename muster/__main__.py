"""The command `muster`: finds Muster's code, puts it first on the import path, and calls launcher/__main__.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def code_folder() -> Path:
    """The folder that holds conf, launcher and jobs: `_bundle` in an installed wheel, the clone in an editable install."""
    bundle = HERE / "_bundle"
    return bundle if bundle.is_dir() else HERE.parent


def main() -> int:
    """Run one command. The code comes first on the path: the working directory may hold a `conf/` or `launcher.py` of its own."""
    sys.path.insert(0, str(code_folder()))
    from launcher import ctrl_c

    ctrl_c.ends_with_a_line("muster")
    from launcher.__main__ import main

    return main(prog="muster")


if __name__ == "__main__":
    sys.exit(main())
