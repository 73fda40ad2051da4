"""The command `muster`: reads the command line and runs one module of launcher/commands. `python -m launcher` is the same."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from launcher import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_with_a_line("python -m launcher")

from conf.errors import UserError
from launcher import slurm, version
from launcher.commands import sweep
from launcher.commands.run import launch
from launcher.paths import CLONE
from launcher.run_folder import record
from launcher.status import find, terminal

WAIT_S = 120.0
"""How long a command waits in all for a Slurm that is busy. A launch waits longer: see launch.py."""

COMMANDS = {
    "run": "run",
    "sweep": "sweep",
    "doctor": "doctor",
    "import": "import_config",
    "ls": "ls",
    "status": "status",
    "compare": "compare",
    "wait": "wait",
    "logs": "logs",
    "why": "why",
    "efficiency": "efficiency",
    "save": "save",
    "stop": "stop",
    "cancel": "cancel",
    "resume": "resume",
    "merge": "merge",
    "push": "push",
    "sync": "sync",
    "completion": "completion",
}
"""What is typed, and its module in launcher/commands. `--help` lists them in this order."""


def parser(prog: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the commands `names`: all of them for --help, one to run it."""
    result = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune an LLM on a SLURM cluster: launch, watch, stop, resume and merge runs.",
        epilog=f"`{prog} run --help` lists the config groups; `{prog} COMMAND --help` explains a command.",
    )
    result.add_argument("--version", action="version", version=version.text(CLONE))
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    for name in names:
        module = import_module(f"launcher.commands.{COMMANDS[name]}")
        sub = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        module.arguments(sub)
        sub.set_defaults(execute=module.execute, prog=prog, whole_parser=lambda: parser("muster", tuple(COMMANDS)))
    return result


def _no_command(words: Sequence[str], prog: str) -> int:
    """Say what to type instead of the first word, which is no command; print the commands if nobody has typed one."""
    if words[:1] in ([], ["help"]):
        parser(prog, tuple(COMMANDS)).print_help()
        return 0 if words else 2
    if "=" in words[0]:
        message = f"{words[0]} is not a command; to launch a run: {prog} run {' '.join(words)}"
    else:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        message = f"{words[0]}: no such command" + (
            f": did you mean {prog} {near[0]}?" if near else f". {prog} help lists them"
        )
    terminal.error(prog, message)
    return 2


def main(arguments: Sequence[str] | None = None, prog: str = "python -m launcher") -> int:
    """Run one command and return its exit code: 2 for a user's error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["run"], ["-sc"], ["--shell-completion"]):  # a shell calls the latter to complete `muster run ...`
        return launch(words[1:], f"{prog} run") if words[0] == "run" else launch(words, prog)
    if words[:1] == ["sweep"] and any("=" in word for word in words):
        return sweep.launch(words[1:], f"{prog} sweep")
    if not words or (words[0] not in COMMANDS and not words[0].startswith("-")):
        return _no_command(words, prog)
    options = parser(prog, words[:1] if words[:1] and words[0] in COMMANDS else tuple(COMMANDS)).parse_args(words)
    try:
        ctrl_c.raises()
        with slurm.retrying(WAIT_S):
            if "run" in options:
                options.run = find.run_of(options.run) if options.by_id else options.run.resolve()
            return int(options.execute(options))
    except slurm.BusyError as error:
        terminal.error(prog, f"Slurm does not answer ({error}), so nothing was changed. Try again later")
        return 2
    except (UserError, slurm.SlurmError) as error:
        terminal.error(prog, str(error))
        return 2
    except PermissionError as error:
        terminal.error(prog, record.closed_file(error))
        return 2
    except BrokenPipeError:  # `muster logs RUN | head`: the reader has closed the pipe
        return 141
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
