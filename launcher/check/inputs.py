"""Looks into what jobs will read, without reading it whole: data files, chat template, prompts, tokenizer, and the run folder.

It only reports: `launcher.check.input_rules` decides what is wrong.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError

from conf.chat_templates import BUNDLED
from conf.choices import Overlong
from conf.data_endings import COMPRESSIONS, ENDINGS
from conf.datasets import held_out, training, training_paths
from conf.schema import Config
from conf.schema_model import DataSet
from launcher.check import model_files
from launcher.check.json_file import read_json
from launcher.run_folder import attempts

MOST_COUNTED = 2**26
"""Bytes of a file whose lines are counted: 64 MiB take 50 ms."""
MAGIC = {".parquet": b"PAR1", ".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""The first bytes of each kind of file."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


@dataclass(frozen=True)
class RunFolder:
    """What jobs of earlier launches left in the run folder."""

    steps: tuple[int, ...] = ()
    """Steps of the complete checkpoints."""
    has_data: bool = False
    has_model: bool = False


@dataclass(frozen=True)
class Inputs:
    """What was seen of the files that jobs will read."""

    files: tuple[tuple[str, str, str], ...] = ()
    """(config key, path, why no job can read it) of each data file."""
    template: str | None = None
    """Why the file at `data.chat_template` is no template."""
    has_template: bool | None = None
    """Whether the tokenizer has a chat template of its own; None if it is not on this machine."""
    tokens_missing: frozenset[str] = field(default_factory=frozenset)
    """Tokens that the config names and the tokenizer does not have. Empty if the tokenizer is not on this machine."""
    tokens: int | None = None
    """Tokens of the tokenizer (at least); None if it is not on this machine."""
    prompts: str | None = None
    """Why a row of `generate.prompts` is no prompt."""
    most_rows: float | None = None
    """Rows of an epoch at most; None if that is not known."""
    run: RunFolder | None = None
    """None where nothing was observed."""


def look(config: Config, hub_cache: Path) -> Inputs:
    """Look at the files. `launcher.check.localize` must have run: paths must be absolute."""
    source = config.model.tokenizer or config.model.source
    revision = None if config.model.tokenizer else config.model.revision
    folder = model_files.find(source, revision, hub_cache)
    tokenizer = folder if folder and (folder / "tokenizer.json").is_file() else None
    return Inputs(
        files=tuple(_unreadable(config)),
        template=_template_error(config.data.chat_template),
        has_template=_has_template(tokenizer) if tokenizer else None,
        tokens_missing=_missing_tokens(config, tokenizer / "tokenizer.json") if tokenizer else frozenset(),
        tokens=model_files.tokenizer_sizes(tokenizer / "tokenizer.json")[0] if tokenizer else None,
        prompts=_prompts_error(Path(config.generate.prompts)) if "generate" in config.jobs else None,
        most_rows=_most_rows(config),
        run=_run_folder(Path(config.run_dir)),
    )


def csv_columns(path: Path) -> tuple[str, ...] | None:
    """The columns that the first line of a CSV or TSV file names; None for other files, and for another separator."""
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    if separator is None or not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = file.readline(2**20)
    return tuple(next(csv.reader([header], delimiter=separator), [])) if separator in header else None


def _unreadable(config: Config) -> Iterator[tuple[str, str, str]]:
    if config.data.cache and Path(config.data.cache).is_file():
        yield "data.cache", config.data.cache, "is a file. Name a folder"
    sets = dict(zip([key for key, _ in training_paths(config.data)], training(config.data).values(), strict=False))
    if validation := held_out(config.data):
        sets["data.validation_path"] = validation
    for key, data_set in sets.items():
        path = Path(data_set.path).expanduser()
        if path.is_file() and (why := _why_unreadable(path)):
            yield key, data_set.path, why
        elif path.is_dir() and not any(item.is_file() for item in path.rglob("*")):
            yield key, data_set.path, "is a folder without files. Name a folder or a file with rows"
        if path.is_file() and key != "data.validation_path":
            yield from _keys_of_the_hub(key.rpartition(".")[0], data_set)


def _why_unreadable(path: Path) -> str | None:
    suffix = path.suffix.lower()
    kind = (path.with_suffix("").suffix if suffix in COMPRESSIONS else path.suffix).lower()
    if kind not in ENDINGS:
        return f"ends in none of {', '.join(ENDINGS)}. Convert the file, or rename it if it is one of these"
    begin = MAGIC.get(suffix)
    try:
        if kind in (".csv", ".tsv", ".txt") and path.stat().st_size == 0:
            return "has no rows. Name a file with rows"
        with path.open("rb") as file:
            if begin and file.read(len(begin)) != begin:
                return f"is no {suffix.removeprefix('.')} file: its first bytes are others. Write the file again, or rename it"
    except OSError as error:
        return f"cannot be read ({error.strerror}). Check its permissions"
    return None


def _keys_of_the_hub(prefix: str, data_set: DataSet) -> Iterator[tuple[str, str, str]]:
    for name in ("subset", "revision", "files"):
        if (value := getattr(data_set, name)) and not Path(data_set.path).name.endswith("dataset_info.json"):
            shown = f"[{','.join(value)}]" if isinstance(value, list) else value
            yield f"{prefix}.{name}", shown, f"has no effect, because {data_set.path} is one file. Remove it"


def _template_error(value: str | None) -> str | None:
    if value is None or value in BUNDLED:
        return None
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(Path(value).read_text(encoding="utf-8"))
    except TemplateSyntaxError as error:
        if "Encountered unknown tag" in str(error):  # {% generation %}, and others that transformers adds
            return None
        return f"line {error.lineno} is not valid Jinja ({error.message}). Correct it"
    except (OSError, UnicodeDecodeError, ValueError):
        return f"is neither a file nor one of {', '.join(BUNDLED)}. Name one of these, or give the full path of a file"
    return None


def _has_template(folder: Path) -> bool:
    fields, _ = read_json(folder / "tokenizer_config.json")
    return bool((fields or {}).get("chat_template")) or any((folder / name).exists() for name in TEMPLATE_FILES)


def _missing_tokens(config: Config, path: Path) -> frozenset[str]:
    data = config.data
    named = {*BUNDLED.get(data.chat_template or "", ()), *data.end_of_turn, data.eos_token, data.pad_token}
    wanted = {token for token in named if token} - set(data.special_tokens)
    if not wanted:
        return frozenset()
    text = path.read_bytes()
    spellings = {token: {json.dumps(token), json.dumps(token, ensure_ascii=False)} for token in wanted}
    return frozenset(token for token, forms in spellings.items() if not any(form.encode() in text for form in forms))


def _prompts_error(path: Path) -> str | None:
    """Why the first row is no prompt. Other rows are left to the generate job."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            line = next((line for line in file if line.strip()), "")
        row = json.loads(line) if line else None
    except OSError:
        return None  # a missing file is reported elsewhere
    except (ValueError, RecursionError) as error:
        return f'the first line is not valid JSON ({error}). Write {{"prompt": "..."}} in each line'
    if row is None:
        return 'has no rows. Write {"prompt": "..."} in each line'
    if not isinstance(row, dict) or not ("prompt" in row or row.get("messages")):
        return 'the first row has neither prompt nor messages. Write {"prompt": "..."} in each line'
    return None


def _most_rows(config: Config) -> float | None:
    """Rows of an epoch at most, from the lines of files of lines. Splitting and JSON in several lines may give more: unknown."""
    if config.data.overlong is Overlong.split:
        return None
    total = 0.0
    for data_set in training(config.data).values():
        path = Path(data_set.path).expanduser()
        if path.suffix.lower() not in (".jsonl", ".ndjson") or not path.is_file() or path.stat().st_size > MOST_COUNTED:
            return None
        lines = path.read_bytes().count(b"\n") + 1
        total += data_set.num_samples or lines * data_set.weight
    return total


def _run_folder(folder: Path) -> RunFolder | None:
    try:
        steps = tuple(attempts.checkpoints(folder))
        has_data, has_model = (folder / "data/data.json").exists(), (folder / "model/muster.json").exists()
    except OSError:  # `observe` reports why the folder cannot be used
        return None
    return RunFolder(steps, has_data, has_model)
