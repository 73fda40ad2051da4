"""Turn a config or a command of Axolotl, LLaMA-Factory, TRL or ms-swift into an experiment; say what becomes of each key."""

import argparse
from pathlib import Path

from launcher.convert import command, convert


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="YAML or JSON of the other program, or a shell script with its command"
    )
    parser.add_argument(
        "--as", dest="program", choices=tuple(convert.PROGRAMS), help="the program; default: recognized by its keys"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="default: conf/experiment/NAME.yaml of Muster")
    parser.add_argument(
        "--gpus", type=_gpus, help="GPUs that its batch size is meant for; default: those of a script, else 8"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an experiment of that name")


def execute(options: argparse.Namespace) -> int:
    return command.run(options.file, options.program, options.out, options.gpus, force=options.force)


def _gpus(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs: give at least 1")
    return int(text)
