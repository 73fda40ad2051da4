"""Print what a shell needs to complete commands, options, runs and settings at TAB: eval "$(muster completion bash)"."""

import argparse
from collections.abc import Callable, Iterator

from conf.jobs import JOB_KINDS
from launcher.paths import CLONE

SHELLS = ("bash", "zsh", "fish")
RUNS = {shell: "_muster_runs" for shell in ("bash", "zsh")} | {"fish": "(_muster_runs)"}
SETTINGS = {shell: "_muster_settings" for shell in ("bash", "zsh")} | {"fish": "(_muster_settings)"}
HELPERS = {
    "bash": r"""
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}  # key=value is one word
_muster_runs() {  # by the name of the run, too
  local file run
  for file in runs/*/config.yaml runs/*/sweep.json runs/*/*/config.yaml; do
    run=${file%/*}
    if [[ -e $file && ($run == "$1"* || ${run##*/} == "$1"*) ]]; then printf '%s\n' "$run"; fi
  done
  while IFS= read -r run; do
    if [[ ! -e $run/config.yaml && ! -e $run/sweep.json ]]; then printf '%s/\n' "$run"; fi
  done < <(compgen -d -- "$1")
}
_muster_settings() {
  local line="muster run $1"
  compgen -W "$(COMP_LINE=$line COMP_POINT=${#line} muster -sc query=bash 2>/dev/null)" -- "$1"
}
_muster() {
  _shtab_muster "$@"
  if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=./] ]]; then compopt -o nospace; fi
}
""",
    "zsh": r"""
_muster_runs() {
  local -a found
  found=(runs/*/(config.yaml|sweep.json)(N:h) runs/*/*/config.yaml(N:h))
  if [[ -n $PREFIX && $PREFIX != */* ]]; then compadd -U -- ${(M)found:#*/$PREFIX*}; else compadd -- $found; fi
  _files -/
}
_muster_settings() {
  local line="muster run $PREFIX"
  compadd -S '' -- ${=$(COMP_LINE=$line COMP_POINT=${#line} muster -sc query=bash 2>/dev/null)}
}
""",
    "fish": r"""
function _muster_runs
  for file in runs/*/config.yaml runs/*/sweep.json runs/*/*/config.yaml
    string replace -r '/[^/]*$' '' $file
  end
  __fish_complete_directories
end
function _muster_settings
  set -l line "muster run "(commandline -ct)
  COMP_LINE=$line COMP_POINT=(string length $line) muster -sc query=bash 2>/dev/null | string split -n ' '
end
""",
}
"""Functions that list what changes: the runs below the working folder, and what Hydra knows of a setting."""
LAST = {"bash": "\ncomplete -o bashdefault -F _muster muster\n"}
"""After shtab's own: no space after KEY=."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="docs/first-hour.md says where to put the output")


def execute(options: argparse.Namespace) -> int:
    import shtab

    whole: Callable[[], argparse.ArgumentParser] = options.whole_parser
    parser = whole()
    for name, command in _commands(parser):
        if name in ("run", "sweep"):
            command.add_argument("overrides", nargs="*")
        for action in command._actions:
            _complete(action)
    print(
        shtab.complete(parser, shell=options.shell, preamble=HELPERS[options.shell]) + LAST.get(options.shell, ""),
        end="",
    )
    return 0


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The name and the parser of each command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _complete(action: argparse.Action) -> None:
    """Say what completes an argument: `complete` is shtab's attribute, `choices` that of argparse."""
    import shtab

    from launcher.check import command_line  # --help starts faster without both

    if action.dest in ("run", "runs"):
        action.complete = RUNS  # type: ignore[attr-defined]
    elif action.dest == "overrides":
        action.complete = SETTINGS  # type: ignore[attr-defined]
    elif action.dest == "job":
        action.choices = list(JOB_KINDS)
    elif action.dest == "cluster":
        action.choices = sorted(command_line.groups(CLONE / "conf")["cluster"])
    elif action.dest in ("folder", "file", "out"):
        action.complete = shtab.DIR if action.dest == "folder" else shtab.FILE  # type: ignore[attr-defined]
