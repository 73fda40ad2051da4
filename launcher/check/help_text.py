"""The text of `--help`, with the config groups, and of `--help KEY`, with what the schema and the groups say about the key."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill, indent

from omegaconf import OmegaConf

from conf import key_reference
from conf.errors import ConfigError, Problem, as_typed
from launcher.check import command_line, synonyms

EXAMPLES = {
    "": "the demo, on this machine",
    "cluster=slurm model=llama70b parallel=zero3": "submit",
    "cluster=slurm model=llama70b parallel=zero3 dry_run=true": "preview, writes nothing",
    "experiment=llama8b_lora data=jsonl data.path=my.jsonl": "a saved command line, your own rows",
    "my.yaml": "an experiment of your own, by its path",
}
OPTIONS = {
    "--help KEY": "explain a key or a section: --help train.learning_rate, --help train",
    "--cfg job": "print the composed config",
    "--config-dir FOLDER": "also search this folder for groups: FOLDER/cluster/mine.yaml",
    "-m": "one run for each of the values: train.learning_rate=1e-5,2e-5",
    "-sc install=bash": "print the shell's code for completion (bash, zsh, fish)",
}
USAGE = """\
Fine-tune an LLM, from raw rows to a consolidated model: on this machine, or as dependent jobs on Slurm.

{examples}

Choose an option of each group with group=option:

{groups}

Set any key with section.key=value: train.learning_rate=2e-5. docs/keys.md lists all keys.

{options}"""
WIDTH = 100
SUGGESTIONS = 5


def asked(words: Sequence[str]) -> list[str] | None:
    """The keys behind `--help`; None if nobody asks for help."""
    flags = {"--help", "-h"}
    if not flags & set(words):
        return None
    return [word for word in words if not word.startswith("-") and "=" not in word]


def text(keys: Sequence[str], folders: Sequence[Path], command: str) -> str:
    """The help for `keys`, or the overview if there are none. `folders` hold the config groups.

    Raises ConfigError for keys that do not exist.
    """
    options = command_line.groups(*folders)
    if keys:
        return "\n\n".join(_explained(key.strip("."), options, folders) for key in keys)
    return USAGE.format(
        examples=_columns({f"  {command} {words}".rstrip(): meaning for words, meaning in EXAMPLES.items()}),
        groups="\n".join(f"{name}: {', '.join(choices)}" for name, choices in options.items()),
        options=_columns(OPTIONS),
    )


def _columns(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{left:<{width}}  {right}" for left, right in rows.items())


def _explained(name: str, options: Mapping[str, Sequence[str]], folders: Sequence[Path]) -> str:
    known = key_reference.keys()
    group = f"group     {name}={'|'.join(options[name])}" if name in options else ""
    if name not in known:
        if group:
            return f"{name}\n{group}"
        raise ConfigError(Problem(name, None, f"no such key{_near(name, list(known))}"))
    key = known[name]
    lines = [name, *([indent(fill(key.text, WIDTH - 2), "  ")] if key.text else []), *([group] if group else [])]
    below = [item for item in known.values() if key.section and item.name.startswith(f"{name}.")]
    if not key.section:
        default = _of_the_groups(name, folders) if key.default is None else key.default or '""'
        lines += [f"type      {key.kind}", f"default   {default}", f"example   {name}={_example(key)}"]
    width = max((len(item.name) for item in below), default=0)
    lines += [f"  {item.name:<{width}}  {_first_sentence(item.text)}".rstrip() for item in below if not item.section]
    return "\n".join(lines)


def _of_the_groups(name: str, folders: Sequence[Path]) -> str:
    """The values that the options of a key's group have for it."""
    group, _, inner = name.partition(".")
    paths = [path for folder in folders for path in sorted((folder / group).glob("*.yaml"))]
    found = {path.stem: OmegaConf.select(OmegaConf.load(path), inner) for path in paths}
    values = [f"{option}: {as_typed(value)}" for option, value in found.items() if value is not None]
    more = f" and {len(values) - SUGGESTIONS} more" if len(values) > SUGGESTIONS else ""
    return f"none. The group {group} sets it: {', '.join(values[:SUGGESTIONS])}{more}" if values else "none. Set it"


def _near(name: str, known: list[str]) -> str:
    """What to look at instead of a key that does not exist."""
    leaf = name.rsplit(".", 1)[-1]
    near = [key for key in known if leaf and leaf in key.rsplit(".", 1)[-1]][:SUGGESTIONS]
    if near and not synonyms.of(name):
        return f". Similar: {', '.join(near)}"
    return synonyms.of(name) or command_line.nearest(name, known) or ". docs/keys.md lists all keys"


def _example(key: key_reference.Key) -> str:
    members = getattr(key.hint, "__members__", None)
    if members:
        return next((name for name in members if name != key.default), str(key.default))
    if key.default and key.default not in ("null", "[]", "{}"):
        return {"true": "false", "false": "true"}.get(key.default, key.default)
    return "..."


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(".")
