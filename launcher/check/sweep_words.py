"""Splits the command line of a sweep into those of its runs, and names each run by the values that are its own."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from conf.errors import ConfigError, Problem, UserError
from conf.schema import Config
from launcher.check import quoting
from launcher.run_folder import sweep_record

T = TypeVar("T")
FLAGS = ("-m", "--multirun")
MOST_RUNS = 1000
"""Slurm's usual limit for an array (MaxArraySize)."""
LONGEST = 120
"""Characters of a run's name: with that of a job's log it must be a name of a file."""
BETWEEN = "--"
"""Stands between the values in a name. Not a comma: a container would take that for the end of a path that it mounts."""
UNSAFE = re.compile(r"[^\w.=+-]+", re.ASCII)
SETTING_FLAGS = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p")
"""Flags of Hydra that say where configs are. All others print something about one config."""
OF_HYDRA = ("hydra.sweep", "hydra/sweep", "hydra.launcher", "hydra/launcher")


class Combination(NamedTuple):
    """One run of a sweep."""

    name: str
    """Its folder, for example `train.learning_rate=1e-4--adapter.r=8`."""
    values: dict[str, str]
    """The keys that have several values, with the one of this run."""
    words: list[str]
    """Its command line, as if it were launched alone."""


def is_sweep(words: Sequence[str]) -> bool:
    """Whether the command line asks for a sweep."""
    return any(word in FLAGS for word in words)


def resumed(words: Sequence[str]) -> Path | None:
    """The sweep that the command line continues, as in `resume=SWEEP`."""
    folders = (Path(word.partition("=")[2]).resolve() for word in words if word.startswith("resume="))
    return next((path for path in folders if sweep_record.is_sweep(path)), None)


def combinations(words: Sequence[str]) -> list[Combination]:
    """Every combination of the values of the keys that have several. Raises ConfigError."""
    kept = [word for word in words if word not in FLAGS]
    if problems := list(_refused(kept)):
        raise ConfigError(*problems)
    choices = {number: values for number, word in enumerate(kept) if (values := several(word))}
    if not choices:
        message = "no key has several values. Write KEY=a,b for a sweep, or type muster run for one run"
        raise ConfigError(Problem("KEY=VALUE", None, message))
    for number, values in choices.items():
        if len(set(values)) < len(values):
            key, _, value = kept[number].partition("=")
            raise ConfigError(Problem(key, value, "has the same value twice"))
    found: list[Combination] = []
    for chosen in itertools.product(*choices.values()):
        own = dict(zip(choices, chosen, strict=True))
        changed = [f"{word.partition('=')[0]}={own[i]}" if i in own else word for i, word in enumerate(kept)]
        by_key = {kept[number].partition("=")[0].lstrip("+"): value for number, value in own.items()}
        found.append(Combination(_name(by_key, {item.name for item in found}), by_key, changed))
        if len(found) > MOST_RUNS:
            raise ConfigError(Problem("KEY=VALUE", None, f"has more than {MOST_RUNS} runs. Split it"))
    return found


def for_each(runs: Sequence[Combination], function: Callable[[Combination], T]) -> list[T]:
    """The results for all runs. Raises ConfigError with the problems of all of them, each named once."""
    results: list[T] = []
    found: dict[str, list[str]] = {run.name: [] for run in runs}
    for run in runs:
        try:
            results.append(function(run))
        except UserError as error:
            found[run.name] += map(str, error.problems)
    if problems := of_runs(found):
        raise ConfigError(*problems)
    return results


def of_runs(lines: Mapping[str, Sequence[str]]) -> list[str]:
    """Each line once, with the runs that have it, unless all have it. `lines`: those of each run, by its name."""
    owners: dict[str, list[str]] = {}
    for name, own in lines.items():
        for line in dict.fromkeys(own):
            owners.setdefault(line, []).append(name)
    return [line + _in(names, len(lines)) for line, names in owners.items()]


def _in(names: Sequence[str], count: int) -> str:
    if len(names) == count:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f" (in {names[0]}{more})"


def folder(configs: Sequence[Config]) -> str:
    """The folder of a sweep that the user has not named: runs/NAME-TIME, with `sweep` for names that differ."""
    first = configs[0]
    if len({config.name for config in configs}) == 1:
        return first.run_dir
    path = Path(first.run_dir)
    return str(path.with_name(path.name.replace(first.name, "sweep", 1)))


def several(word: str) -> list[str]:
    """The values of a word that has several, as they are typed; none for any other word."""
    override = _parsed(word)
    if override is None or not override.is_sweep_override() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    values = [str(value) for value in override.sweep_string_iterator()]
    if override.value_type is not ValueType.SIMPLE_CHOICE_SWEEP:  # range(1,3), choice(a,b)
        return values
    typed = quoting.split_items(f"[{word.partition('=')[2]}]", "[]") or []
    return typed if len(typed) == len(values) else values  # typed: 1e-4 instead of 0.0001


def _parsed(word: str) -> Override | None:
    """The override that Hydra reads in a word; None for a flag, or for what Hydra cannot read."""
    if word.startswith(("-", "~")) or "=" not in word:
        return None
    readable, _ = quoting.read_words([word])
    try:
        return OverridesParser.create().parse_override(readable[0]) if readable else None
    except HydraException:
        return None


def _refused(words: Sequence[str]) -> Iterator[Problem]:
    """Words that make no sense for several runs."""
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        override = _parsed(word)
        if word.startswith("-") and word.partition("=")[0] not in SETTING_FLAGS:
            yield Problem(word, None, "is not for a sweep. Type it with muster run, and one value of each key")
        elif override is not None and override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            yield Problem(key, value, "is a pattern. Write the values, as KEY=a,b")
        elif key.startswith(OF_HYDRA):
            yield Problem(key, value, "has no effect, because Muster itself starts the runs of a sweep. Remove it")
        elif key == "resume":
            yield Problem(key, value, "continues a run or a sweep. Type muster resume FOLDER")
        elif key == "submit" and value == "script":
            yield Problem(
                key, value, "writes the scripts of one run. Launch the runs one by one, or preview with dry_run=true"
            )
        elif (key in ("run_dir", "dry_run") or key.startswith(("sweep.", "cluster.executor"))) and several(word):
            yield Problem(key, value, "must have one value: it belongs to the whole sweep")


def _name(values: dict[str, str], taken: set[str]) -> str:
    """A name for a folder: what paths, shells or Slurm would misread becomes `-`, and equal names get a number."""
    parts = (f"{key}={UNSAFE.sub('-', value).strip('-')}" for key, value in values.items())
    name = UNSAFE.sub("-", BETWEEN.join(parts))[:LONGEST].strip("-.")
    numbered = (f"{name}{BETWEEN}{number}" for number in itertools.count(2))
    return next(item for item in itertools.chain([name], numbered) if item not in taken)
