"""Reads the training command of a shell script, without running anything: its program, its keys, its variables and its GPUs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from conf.errors import ConfigError, Problem
from launcher.convert import shell_words

SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch", ".txt")
INTERPRETERS = re.compile(r"(.*/)?(python[\d.]*|accelerate|torchrun|deepspeed|srun)|\$\{?\w+\}?")
GPUS_PER_NODE = ("nproc_per_node", "nproc-per-node", "num_gpus", "NPROC_PER_NODE")
ALL_GPUS = ("num_processes", "num-processes")
NODES = ("nnodes", "num_nodes", "num_machines", "NNODES")
DEVICES = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
TRAININGS: dict[str, re.Pattern[str]] = {
    "ms-swift": re.compile(r"swift (sft|pt)|(.*/)?swift/cli/(sft|pt)\.py|swift\.cli\.(sft|pt)"),
    "llamafactory": re.compile(r"(llamafactory-cli|lmf) train|(.*/)?src/train\.py|(.*/)?llamafactory/launcher\.py"),
    "axolotl": re.compile(r"axolotl train|axolotl\.cli\.train|(.*/)?scripts/finetune\.py"),
    "trl": re.compile(r"trl sft|(.*/)?sft(_\w+)?\.py|trl\.scripts\.sft"),
}
"""The words, or the script, that start a fine-tuning."""
OTHERS = re.compile(
    r"(swift|megatron|trl|axolotl|llamafactory-cli) [a-z][\w-]*|(axolotl|swift)\.cli\.\w+"
    r"|(.*/)?(dpo|grpo|kto|orpo|cpo|reward|rloo|ppo|gkd)(_\w+)?\.py|(.*/)?swift/cli/(.*/)?\w+\.py"
)
"""What starts something else of these programs."""


LAUNCH_CONFIG = "config_file of accelerate"
"""Stands among the keys for the config of `accelerate launch`."""


@dataclass
class Command:
    """The command of a training."""

    program: str
    keys: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    """The YAML or JSON file that it names; its own keys win."""
    unread: dict[str, str] = field(default_factory=dict)
    """Words that could not be read, and why."""
    gpus: int | None = None
    line: str = ""


def is_script(path: Path) -> bool:
    return path.suffix in SUFFIXES or _first_line(path).startswith("#!")


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline()
    except OSError:
        return ""


def read(path: Path) -> Command:
    """The only training command of a script. Raises ConfigError if there is none, several, or one of another kind."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem("FILE", path, f"cannot be read: {error}")) from None
    found, others = list[Command](), list[str]()
    for words, environment, variables in shell_words.commands(text, path):
        command, other = _command(words, environment, variables)
        found += [command] if command else []
        others += [other] if other else []
    if len(found) == 1:
        return found[0]
    if found:
        lines = "; ".join(command.line for command in found)
        raise ConfigError(Problem("FILE", path, f"has {len(found)} trainings ({lines}). Give a file with one of them"))
    if others:
        message = (
            f"starts `{others[0]}`, which is no fine-tuning on texts. Run it as it is under Slurm: pipeline=custom "
            "custom.command=... (docs/own-trainer.md)"
        )
        raise ConfigError(Problem("FILE", path, message))
    names = "swift sft, trl sft, llamafactory-cli train, axolotl train, or a launcher with their script"
    raise ConfigError(Problem("FILE", path, f"has no training command. Known are {names}"))


def _command(
    words: list[str], environment: dict[str, str], variables: dict[str, str]
) -> tuple[Command | None, str | None]:
    """(the training that these words start, or None; another command of these programs, or None)."""
    options: dict[str, str] = {}
    start = " ".join(words[:2])
    rest = words[2:]
    if not any(pattern.fullmatch(start) for pattern in (*TRAININGS.values(), OTHERS)):
        if not INTERPRETERS.fullmatch(words[0]):
            return None, None
        found = _script(words[1:])
        if found is None:
            return None, None
        options, start, rest = found
    program = next((name for name, pattern in TRAININGS.items() if pattern.fullmatch(start)), None)
    if program is None:
        return None, start if OTHERS.fullmatch(start) else None
    command = Command(program, variables=environment, line=start)
    _read_arguments(command, rest)
    command.gpus = _gpus(options | {name: str(value) for name, value in variables.items()}, program, words[0])
    if config := options.get("config_file"):
        command.keys[LAUNCH_CONFIG] = config
    return command, None


def _script(words: Sequence[str]) -> tuple[dict[str, str], str, list[str]] | None:
    """(options of the launcher, the script or module, its arguments) of what a launcher starts."""
    options: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "-m" and rest:
            return options, rest[0], rest[1:]
        if word.startswith("-"):
            name, _, value = word.lstrip("-").partition("=")
            if not value and rest and not rest[0].startswith("-") and not rest[0].endswith(".py"):
                value = rest.pop(0)
            options[name] = value
        elif word.endswith(".py"):
            return options, word, rest
        elif any(pattern.fullmatch(" ".join([word, *rest[:1]])) for pattern in (*TRAININGS.values(), OTHERS)):
            return options, " ".join([word, *rest[:1]]), rest[1:]
    return None


def _read_arguments(command: Command, words: Sequence[str]) -> None:
    """`--key value value`, `--key=value`, `--flag`, `key=value` of LLaMA-Factory, and the path of a config."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = [value] if equals else []
            while not equals and rest and (not rest[0].startswith("--") or _is_number(rest[0])):
                values.append(rest.pop(0))
            _set(command, name.replace("-", "_"), values)
        elif word.endswith((".yaml", ".yml", ".json")) and command.config is None:
            command.config = word
        elif "=" in word and not word.startswith("-"):
            name, _, value = word.partition("=")
            _set(command, name.lstrip("+"), [value])
        else:
            command.unread[word] = "is no key with a value"


def _set(command: Command, name: str, values: list[str]) -> None:
    if name == "config" and len(values) == 1:
        command.config = values[0]
        return
    if any(shell_words.VARIABLE.search(value) for value in values):
        command.unread[f"--{name}"] = "its value comes from the shell: write it out in the script"
        return
    read = [_value(value) for value in values]
    command.keys[name] = True if not read else read[0] if len(read) == 1 else read


def _value(text: str) -> Any:
    """The value of a word, as YAML reads it; text that is no YAML is itself."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if value is None and text not in ("null", "~") else value


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?[\d.]+(e-?\d+)?", word) is not None


def _gpus(names: dict[str, str], program: str, first: str) -> int | None:
    """GPUs that the command trains on; None if it says nothing."""
    found = {name: int(value) for name, value in names.items() if str(value).isdigit()}
    nodes = next((found[name] for name in NODES if name in found), 1)
    if total := next((found[name] for name in ALL_GPUS if name in found), None):
        return total
    if each := next((found[name] for name in GPUS_PER_NODE if name in found), None):
        return each * nodes
    if program == "ms-swift" and "torchrun" not in first:
        return 1  # without NPROC_PER_NODE, ms-swift starts one process
    devices = next((names[name] for name in DEVICES if name in names), "")
    listed = [device for device in devices.split(",") if device.strip().isdigit()]
    return len(listed) * nodes if listed else None
