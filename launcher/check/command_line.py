"""Checks the words of a command line against the schema and the config groups, all at once, before Hydra stops at the first."""

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import resolve
from conf.errors import Problem
from conf.schema import Architecture, Config

FLAGS_WITH_VALUE = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--info",
    "-i",
)


def groups(folder: Path) -> dict[str, list[str]]:
    """Every config group below `folder` with its options, sorted."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.yaml")):
        found.setdefault(path.parent.name, []).append(path.stem)
    return found


def problems(words: list[str], folder: Path) -> list[Problem]:
    """What is wrong with the overrides among `words` (flags such as `--help` are Hydra's to judge)."""
    known, options, schema, found = resolve.keys(), groups(folder), OmegaConf.structured(Config), []
    right: list[Override] = []
    schema.model.architecture = Architecture  # a section that may be absent
    for previous, word in zip(["", *words], words, strict=False):
        if word.startswith("-") or previous in FLAGS_WITH_VALUE:
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            found.append(
                Problem(word, None, "is not of the form key=value; quote what the shell or Hydra would read otherwise")
            )
            continue
        problem = _problem(override, known, options, schema)
        if problem:
            found.append(problem)
        else:
            right.append(override)
    return found + _shapeless(right, folder, options)


def opened(words: list[str]) -> list[str]:
    """The same words, with Hydra's `++` before those that add to a free-form dictionary: nobody should have to know."""
    free = [key for key, hint in resolve.keys().items() if str(hint).startswith("dict")]
    return [f"++{word}" if any(word.startswith((f"{key}=", f"{key}.")) for key in free) else word for word in words]


def _problem(
    override: Override, known: dict[str, Any], options: dict[str, list[str]], schema: DictConfig
) -> Problem | None:
    key = override.key_or_group.split("@")[0].lstrip("/")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")) or override.is_sweep_override():
        return None
    if key == "experiment" and override.value() is None:
        return None
    if key in options:
        return _option(key, str(override.value()), options[key])
    if key in known:
        return _value(key, override, known, schema)
    for free, hint in known.items():
        if str(hint).startswith("dict") and key.startswith(f"{free}."):
            return _entry(key, key.removeprefix(f"{free}.").split(".", 1)[1:], resolve.named_sections().get(free))
    return Problem(key, None, f"no such key{nearest(key, [*known, *options])}")


def _shapeless(overrides: list[Override], folder: Path, options: dict[str, list[str]]) -> list[Problem]:
    """What is said of a shape that the named model does not have: Hydra cannot put it anywhere."""
    values = {word.key_or_group: word.value() for word in overrides}
    shape = {key: value for key, value in values.items() if key.startswith("model.architecture") and value is not None}
    model = str(values.get("model"))
    if not shape or model not in options["model"]:
        return []
    if "architecture" in OmegaConf.load(folder / "model" / f"{model}.yaml"):
        return []
    said = f"model={model} has the shape that its config.json says: leave this out, or take a model that is drawn by its shape"
    return [Problem(key, value, said) for key, value in shape.items()]


def _entry(key: str, rest: list[str], section: type | None) -> Problem | None:
    """A key inside a dictionary of sections: what stands after the name that the user chose."""
    entries = [item.name for item in fields(section)] if section else []
    leaf = rest[0].split(".")[0] if rest else None
    if not entries or leaf is None or leaf in entries:
        return None
    return Problem(key, None, f"no such key{nearest(leaf, entries)}; there are {', '.join(entries)}")


def _option(group: str, value: str, options: list[str]) -> Problem | None:
    if value in options:
        return None
    return Problem(group, value, f"no such option{nearest(value, options)}; there are {', '.join(options)}")


def _value(key: str, override: Override, known: dict[str, Any], schema: DictConfig) -> Problem | None:
    """Try the value in an empty config: OmegaConf knows the types."""
    if override.is_delete():
        return Problem(key, None, "cannot be deleted; set it to null where it may be empty")
    value = override.value()
    if isinstance(value, str) and "${" in value:
        return None
    try:
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        return Problem(key, value, f"is not {_describe(known[key])}")
    return None


def _describe(hint: Any) -> str:
    """A type in words: `a whole number`, `one of a, b`."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if isinstance(hint, type) and hasattr(hint, "__members__"):
        return "one of " + ", ".join(hint.__members__)
    for kind, text in words.items():
        if hint is kind:
            return text
        if str(hint) == f"{kind.__name__} | None":
            return f"{text}, or null"
    return f"of type {getattr(hint, '__name__', hint)}"


def nearest(word: str, candidates: list[str]) -> str:
    """`: did you mean 'x'?`, or nothing where no candidate is near; a key is also compared by its last part."""
    found = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if not found:
        by_leaf = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        found = [
            by_leaf[leaf] for leaf in difflib.get_close_matches(word.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.75)
        ]
    return f": did you mean '{found[0]}'?" if found else ""
