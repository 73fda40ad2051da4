"""Checks the overrides of a command line against the schema and the config groups.

Hydra stops at the first wrong override. This reports all of them, each with the nearest key or option that exists.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import resolve
from conf.data_endings import ENDINGS
from conf.errors import Problem
from conf.key_reference import describe_type
from conf.schema import Config
from conf.schema_model import Architecture
from conf.visible import visible
from launcher import sbatch_options
from launcher.check import quoting, word_forms
from launcher.secret_names import MASK, found, masked

LISTED = ("experiment", "tracker")
"""Groups of which several options can be taken, as in experiment=[a,b]."""
OTHER_CONFIG = ("--config-name", "-cn", "--config-path", "-cp")
OTHER_CONFIG_REMEDY = (
    "every run begins with Muster's own config. Give your file as an experiment, launch.py FILE.yaml, "
    "or the folder of your groups with --config-dir"
)


def groups(folder: Path, *more: Path) -> dict[str, list[str]]:
    """Every config group below `folder` with its options, sorted; with those that the folders `more` add to these groups."""
    options: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.yaml")):
        options.setdefault(path.parent.name, []).append(path.stem)
    for group, known in options.items():
        known += sorted({path.stem for other in more for path in other.glob(f"{group}/*.yaml")} - {*known})
    return options


def settings(words: Iterable[str]) -> list[tuple[str, str]]:
    """(key or group, value) of each word that sets one, in their order."""
    pairs = (word.lstrip("+").partition("=") for word in words if "=" in word and not word.startswith("-"))
    return [(key, value) for key, _, value in pairs]


def keys(words: Iterable[str]) -> list[str]:
    """The keys and groups that the words of a command line set, without those of Hydra itself."""
    return [key for key, _ in settings(words) if not key.startswith("hydra.")]


def problems(
    words: list[str],
    folder: Path,
    experiments: Sequence[str] = (),
    more: Sequence[Path] = (),
    *,
    in_sweep: bool = False,
) -> list[Problem]:
    """What is wrong with the overrides among `words`, in their order.

    `folder` holds the config groups, and the folders `more` add to them; `experiments` are names of other experiments. Flags
    such as `--help` are skipped: Hydra checks them. `in_sweep`: they are those of one run of a sweep.
    """
    if {"-sc", "--shell-completion"} & set(words):  # its words, such as install=bash, are no keys
        return []
    known, options, reported = resolve.keys(), groups(folder, *more), list[Problem]()
    options.setdefault("experiment", []).extend(experiments)
    schema = OmegaConf.structured(Config)
    schema.model.architecture = (
        Architecture  # optional, so None in the schema; without this its keys could not be checked
    )
    valid: list[Override] = []
    is_sweep = bool({"-m", "--multirun"} & set(words))
    reported += word_forms.problems(words, {**known, **options}, lambda key: instead(key, [*known, *options]))
    words = word_forms.without_these(words)
    in_sweep = in_sweep or any(
        word.startswith("resume=") for word in words
    )  # of a sweep, perhaps: sweep.stop_worst=null
    for previous, word in zip(["", *words], words, strict=False):
        if word.split("=")[0] in OTHER_CONFIG:
            reported.append(Problem(word.split("=")[0], None, OTHER_CONFIG_REMEDY))
        if word.startswith("-") or previous in word_forms.FLAGS_WITH_VALUE:
            continue
        if (is_sweep or word.lstrip("+~").startswith("hydra")) and (problem := _secret(word)):
            reported.append(problem)
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            reported.append(Problem(word, None, word_forms.not_parsed(word, known)))
            continue
        problem = _problem(override, known, options, schema)
        if problem:
            reported.append(problem)
        elif override.key_or_group.startswith("sweep.") and not (is_sweep or in_sweep):
            message = "has no effect on one run. Give several values of a key, as in muster sweep train.seed=0,1"
            reported.append(Problem(override.key_or_group, word.partition("=")[2], message))
        elif override.is_sweep_override() and not is_sweep:
            key, _, value = word.partition("=")
            reported.append(Problem(key, value, _several_values(key, value)))
        else:
            valid.append(override)
    return [*reported, *_shape_of_a_model_without_one(valid, folder, options), *_two_lengths(valid)]


def notes(words: Sequence[str]) -> list[str]:
    """A line for each `key=value` that another value of the same key comes after. Hydra takes the last one without a word."""
    pairs = [(key, value) for key, value in settings(words) if not key.startswith("~")]
    last = dict(pairs)
    earlier = dict.fromkeys((key, value) for key, value in pairs if value != last[key])
    lines = (f"warning   {key}={value} is not used: {key}={last[key]} comes after it" for key, value in earlier)
    return [visible(masked(line)) for line in lines]


def _two_lengths(overrides: list[Override]) -> list[Problem]:
    """`train.epochs` beside `train.steps`, which is used instead."""
    values = {override.key_or_group: override.value() for override in overrides}
    steps, epochs = values.get("train.steps"), values.get("train.epochs")
    if steps is None or epochs is None:
        return []
    return [Problem("train.epochs", epochs, f"has no effect, because train.steps={steps} is used. Remove one of them")]


def _secret(word: str) -> Problem | None:
    """A word that would write a secret to a file before the config is checked: Hydra stores those of a sweep and its own."""
    key, _, value = word.partition("=")
    if any(kind != "a key of W&B" for kind, _ in found(value)):  # that one has the form of a commit
        return Problem(key, MASK, "is or holds a secret, and would be written to files. Remove it")
    return None


def _several_values(key: str, value: str) -> str:
    message = "has several values. Add -m to start one run for each (muster sweep does the same)"
    if quoting.is_text(key.lstrip("+")) and (typed := quoting.quoted(key, value)):
        return f"{message}, or write one value that has commas as {typed}"
    return f"{message}, or write a list as [a,b]"


def allow_new_entries(words: list[str]) -> list[str]:
    """Prefix overrides of free-form dictionaries with Hydra's `++`.

    Hydra refuses `cluster.environment.NAME=1` without it, because the schema has no such key.
    """
    free = [key for key, hint in resolve.keys().items() if str(hint).startswith("dict")]
    return [f"++{word}" if any(word.startswith((f"{key}=", f"{key}.")) for key in free) else word for word in words]


def in_hydras_order(words: Sequence[str]) -> list[str]:
    """The words with flags first, because Hydra's parser wants all overrides together, and without `experiment=null`.

    Hydra refuses null for a group. It means the same as no experiment, and the last one counts.
    """
    flags, overrides, is_value = list[str](), list[str](), False
    for word in words:
        if word.lstrip("+") in ("experiment=null", "experiment="):
            overrides = [item for item in overrides if not item.lstrip("+").startswith("experiment=")]
            continue
        (flags if is_value or word.startswith("-") else overrides).append(word)
        is_value = word in word_forms.FLAGS_WITH_VALUE
    return [*flags, *overrides]


def _problem(
    override: Override, known: dict[str, Any], options: dict[str, list[str]], schema: DictConfig
) -> Problem | None:
    key = override.key_or_group.split("@")[0].lstrip("/")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")) or override.is_sweep_override():
        return None
    if key == "experiment" and override.value() is None:
        return None
    if key in options:
        return _option(key, override.value(), options[key])
    if key in known:
        return _value(key, override, known, schema)
    for free, hint in known.items():
        if str(hint).startswith("dict") and key.startswith(f"{free}."):
            return _entry(key, key.removeprefix(f"{free}.").split(".", 1)[1:], resolve.named_sections().get(free))
    return Problem(key, None, f"no such key{instead(key, [*known, *options])}")


def _option(group: str, value: Any, known: list[str]) -> Problem | None:
    """A value of a group that is none of its options, or several of them where only one can be."""
    values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if unknown := next((item for item in values if item not in known), None):
        return Problem(group, unknown, _own_files(group, unknown, known) or _unknown("option", unknown, known))
    if isinstance(value, list) and group not in LISTED:
        return Problem(group, _as_typed(value), f"takes one option. Type {group}={values[-1] if values else known[0]}")
    return None


def _own_files(group: str, value: str, known: list[str]) -> str:
    """What to type for a path or a repository of the Hub in place of an option; "" for another value."""
    path = Path(value)
    if path.suffix in (".yaml", ".yml") and path.stem not in known:
        copy = f"~/.config/muster/conf/{group}/{path.stem}.yaml"
        return f"is the name of a file, not of an option. Copy the file to {copy}, and type {group}={path.stem}"
    words = {"model": f"model=hub model.source={value}", "data": f"data=jsonl data.path={value}"}
    is_path = "/" in value or path.suffix in (".gguf", ".safetensors", *ENDINGS)
    return f"is no option of this group. Write {words[group]}" if group in words and is_path else ""


def instead(key: str, candidates: list[str]) -> str:
    """What to type instead of a key that does not exist: the word of another program, or the nearest key."""
    from launcher.check import synonyms  # the tables of other programs are needed for this message only

    return synonyms.of(key) or nearest(key, candidates) or ". docs/keys.md lists all keys"


def _shape_of_a_model_without_one(
    overrides: list[Override], folder: Path, options: dict[str, list[str]]
) -> list[Problem]:
    """Overrides of `model.architecture` for a model that has none: Hydra could not merge them, and names no key."""
    values = {override.key_or_group: override.value() for override in overrides}
    shape = {key: value for key, value in values.items() if key.startswith("model.architecture") and value is not None}
    model = str(values.get("model"))
    if not shape or model not in options["model"]:
        return []
    path = folder / "model" / f"{model}.yaml"
    if not path.exists() or "architecture" in OmegaConf.load(path):  # one of the user's own: Hydra says what is wrong
        return []
    message = f"model={model} reads its shape from config.json. Remove this override"
    return [Problem(key, value, message) for key, value in shape.items()]


def _entry(key: str, after_name: list[str], section: type | None) -> Problem | None:
    """Check a key inside a dictionary of sections, such as `data.sets.NAME.path`.

    `after_name` is empty or holds one string: what follows the name that the user chose.
    """
    names = [item.name for item in fields(section)] if section else []
    leaf = after_name[0].split(".")[0] if after_name else None
    if not names or leaf is None or leaf in names:
        return None
    return Problem(key, None, _unknown("key", leaf, names))


def _unknown(kind: str, word: str, candidates: list[str]) -> str:
    """The message for a key or option that does not exist: the nearest one, and all that there are."""
    return f"no such {kind}{nearest(word, candidates) or '.'} Choose from {', '.join(candidates)}"


def _value(key: str, override: Override, known: dict[str, Any], schema: DictConfig) -> Problem | None:
    """Check a value by setting it in an empty config: OmegaConf knows the types."""
    if override.is_delete():
        return Problem(key, None, "cannot be deleted. If it is optional, set it to null")
    value = override.value()
    if isinstance(value, str) and "${" in value:  # an interpolation: Hydra resolves it later
        return None
    if (
        isinstance(value, str) and value != value.strip() and not quoting.is_text(key)
    ):  # "64 " would be taken for a number
        return Problem(key, repr(value), f"must be {describe_type(known[key])}, without blanks")
    if known[key] is bool and isinstance(value, int | float) and value not in (0, 1):
        return Problem(key, value, not_of_type(key, known))
    try:
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        return Problem(key, _as_typed(value), not_of_type(key, known, value))
    return None


def not_of_type(key: str, known: dict[str, Any], value: Any = None) -> str:
    """The message for a value of a wrong type; a section has keys instead of a value."""
    inner = [name for name in known if name.startswith(f"{key}.")]
    if inner:
        return f"has keys of its own. Set one of {', '.join(inner)}"
    message = f"must be {describe_type(known[key])}"
    if key.endswith("time_min") and (minutes := sbatch_options.minutes(str(value))):
        return f"{message}, in minutes. Write {key}={minutes}"
    members = list(getattr(known[key], "__members__", ()))
    if not members or not isinstance(value, str):
        return message
    begins = max((name for name in members if value.lower().startswith(name)), key=len, default=None)  # adamw_torch
    return message + (f": did you mean '{begins}'?" if begins else nearest(value, members))


def _as_typed(value: Any) -> Any:
    """A list as the user types it: `[a,b]`, not `['a', 'b']`."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else value


def nearest(word: str, candidates: list[str]) -> str:
    """`: did you mean 'x'?`, or an empty string if no candidate is similar. A key also matches by its last part alone."""
    lowered = {candidate.lower(): candidate for candidate in candidates}
    similar = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    if not similar:
        by_leaf = {candidate.rsplit(".", 1)[-1].lower(): candidate for candidate in candidates}
        leaves = difflib.get_close_matches(word.lower().rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.75)
        return f": did you mean '{by_leaf[leaves[0]]}'?" if leaves else ""
    return f": did you mean '{lowered[similar[0]]}'?"
