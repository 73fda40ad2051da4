"""Finds the files of a data source, in the order in which they are read, without those of validation and test."""

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path

from conf.data_endings import ENDINGS
from conf.errors import DataError, Problem, first_line
from conf.schema_model import DataSet
from jobs.data import remote_files, split_names
from jobs.data.file_trees import DataFile, LocalTree, RemoteTree, Tree
from jobs.distributed.log_once import log_once

METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `save_to_disk` and LLaMA-Factory write beside the rows; they hold no rows."""
MAGIC = re.compile(r"[*?\[]")
SHOWN = 5
"""File names that a message lists at most."""


def find_files(source: DataSet) -> list[DataFile] | None:
    """The files of a source in the order in which they are read; None if the library `datasets` must load it: a Hub set, or
    a folder whose README.md lists subsets.

    Raises DataError if the path looks like a file, a folder or a glob, but has no data file.
    """
    if remote_files.is_web(source.path):
        _refuse_hub_keys(source, "a web address")
        return [DataFile(source.path, remote_files.web_name(source.path), remote_files.download(source.path))]
    if remote_files.is_remote(source.path):
        filesystem, path = remote_files.file_system(source.path)
        try:
            return _find(source, RemoteTree(filesystem), path)
        except DataError:
            raise
        except Exception as error:  # anything that a file system's client raises: no network, no credentials
            raise DataError(Problem("data.path", source.path, f"cannot be read: {first_line(error)}")) from error
    return _find(source, LocalTree(), str(Path(source.path).expanduser()))


def _find(source: DataSet, tree: Tree, path: str) -> list[DataFile] | None:
    if tree.is_file(path):
        _refuse_hub_keys(source, "a file")
        return [tree.file(path)]
    folder, split, rows = path, None, None
    named_split = re.fullmatch(r"(.+):([\w.-]+)(\[.*\])?", path)
    if named_split and not tree.is_dir(path) and tree.is_dir(named_split[1]):
        folder, split, rows = named_split.groups()
    if tree.is_dir(folder):
        if isinstance(tree, LocalTree) and not source.files and lists_subsets(Path(folder)):
            _refuse_hub_keys(source, "a folder", ("revision",))
            return None
        if rows:
            message = (
                f"a range of rows belongs into data.split: data.path={tree.shown(folder)}:{split} data.split='{rows}'"
            )
            raise DataError(Problem("data.path", source.path, message))
        if not source.files:
            _refuse_dataset_info(source, tree, folder)
        _refuse_hub_keys(source, "a folder whose README.md lists no subsets", ("subset", "revision"))
        return [tree.file(name) for name in _folder_files(source, tree, folder.rstrip("/"), split)]
    if MAGIC.search(path) and not _is_hub_range(path):
        _refuse_hub_keys(source, "a pattern")
        return [tree.file(name) for name in _glob_files(source, tree, path)]
    if isinstance(tree, RemoteTree) or path.startswith(("/", ".", "~")):
        offline = (
            ". HF_HUB_OFFLINE is set, so that the Hub is not asked" if remote_files.is_hidden_hub(source.path) else ""
        )
        raise DataError(Problem("data.path", source.path, f"no such file{offline}"))
    return None


def _is_hub_range(path: str) -> bool:
    """Whether a path is a range of rows of a Hub set, `owner/name:train[:100]`, not a pattern."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?:\w+\[[-\d%]*:[-\d%]*\]", path) is not None


def _refuse_hub_keys(source: DataSet, kind: str, keys: Sequence[str] = ("subset", "revision", "files")) -> None:
    """Raise DataError if one of these keys is set, which this kind of source does not have."""
    for key in keys:
        if value := getattr(source, key):
            where = "Hub sets and folders" if key == "files" else "Hub sets"
            where += ", and to LLaMA-Factory's dataset_info.json" if key == "subset" else ""
            message = f"applies to {where} only, but {source.path} is {kind}: remove it"
            raise DataError(Problem(f"data.{key}", ",".join(value) if key == "files" else value, message))


def lists_subsets(folder: Path) -> bool:
    """Whether the README.md of a folder has the Hub's list of subsets (`configs:`)."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    header = re.match(r"---\s*\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return header is not None and re.search(r"^configs:", header[1], re.MULTILINE) is not None


def _folder_files(source: DataSet, tree: Tree, folder: str, split: str | None) -> list[str]:
    if source.files:
        return _named_files(source, tree, folder)
    if saved := _saved_splits(tree, folder):
        folder, split = f"{folder}/{_saved_split(source, tree.shown(folder), saved, split)}", None
    elif split is not None and tree.is_dir(f"{folder}/{split}"):
        folder, split = f"{folder}/{split}", None
    found = _data_files(source, tree, folder, tree.find(folder))
    if not found:
        raise DataError(Problem("data.path", source.path, f"has no file ending in {', '.join(ENDINGS)}"))
    return _choose(source, tree, folder, found, split)


def _glob_files(source: DataSet, tree: Tree, pattern: str) -> list[str]:
    matched = tree.glob(pattern)
    if not matched:
        raise DataError(Problem("data.path", source.path, "no such file"))
    folder = MAGIC.split(pattern)[0].rpartition("/")[0]
    found = _data_files(source, tree, folder, [path for path in matched if tree.is_file(path)])
    if not found:
        raise DataError(Problem("data.path", source.path, f"has no file ending in {', '.join(ENDINGS)}"))
    return _choose(source, tree, folder, found, None)


def _named_files(source: DataSet, tree: Tree, folder: str) -> list[str]:
    """The files that `data.files` names, each once, in the order of the patterns."""
    found: dict[str, None] = {}
    for pattern in source.files:
        if pattern.startswith(("/", "~")) or ".." in Path(pattern).parts:
            raise DataError(
                Problem(
                    "data.files",
                    pattern,
                    f"must name files inside {source.path}: begin it with neither / nor ~, and write no .. in it",
                )
            )
        matched = tree.glob(f"{glob.escape(folder)}/{pattern}")
        paths = [path for item in matched for path in ([item] if tree.is_file(item) else tree.find(item))]
        paths = [path for path in paths if _ending(path) in ENDINGS]
        if not paths:
            names = [_relative(path, folder) for path in tree.find(folder) if _ending(path) in ENDINGS]
            raise DataError(
                Problem("data.files", pattern, f"matches no file of {source.path}, which has {_listed(names)}")
            )
        found |= dict.fromkeys(paths)
    return list(found)


def _data_files(source: DataSet, tree: Tree, folder: str, paths: Sequence[str]) -> list[str]:
    """Those of these files that hold rows: no metadata, no copies that tools keep in hidden folders or caches."""
    kept = [path for path in paths if _holds_rows(_relative(path, folder))]
    for state in {f"{path.rpartition('/')[0]}/state.json" for path in kept if path.endswith(".arrow")}:
        if tree.is_file(state):
            saved = _saved_files(source, tree, state)
            here = state.rpartition("/")[0]
            kept = [path for path in kept if path.rpartition("/")[0] != here or path in saved]
    return _without_notes(source, tree, folder, kept)


def _without_notes(source: DataSet, tree: Tree, folder: str, paths: list[str]) -> list[str]:
    """The files without texts such as LICENSE.txt and requirements.txt beside files of rows; says which are left out."""
    notes = [path for path in paths if _ending(path) == ".txt" and not _has_split(_relative(path, folder))]
    if not notes or all(_ending(path) == ".txt" for path in paths):
        return paths
    names = [_relative(path, folder) for path in notes]
    hint = f"to read them: data.path={tree.shown(folder)} {_as_files(names[:1])}"
    log_once(f"files     {source.path}: leaves out {_listed(names)}, because other files hold rows ({hint})")
    return [path for path in paths if path not in set(notes)]


def _has_split(name: str) -> bool:
    try:
        return split_names.split_of(name) is not None
    except split_names.UnclearSplit:
        return True


def _holds_rows(name: str) -> bool:
    *folders, file = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in (*folders, file))
    return not hidden and file not in METADATA and _ending(file) in ENDINGS and not _is_cache(file)


def _is_cache(file: str) -> bool:
    """Whether `datasets` wrote this file as the result of a map or filter."""
    return re.fullmatch(r"cache-[0-9a-f]+\w*\.arrow", file) is not None


def _saved_files(source: DataSet, tree: Tree, state: str) -> list[str]:
    """The files that `save_to_disk` lists in state.json."""
    try:
        content = json.loads(tree.read(state))
        names = [item["filename"] for item in content["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(Problem("data.path", state, f"is not the state.json of save_to_disk: {error!r}")) from error
    if content.get("_indices_files") or content.get("_indices_data_files"):
        message = "was saved with a selection of its rows in a file of its own, by an old version of `datasets`: load it with "
        message += "that version, and save the result of flatten_indices()"
        raise DataError(Problem("data.path", source.path, message))
    folder = state.rpartition("/")[0]
    return [f"{folder}/{name}" for name in names]


def _saved_splits(tree: Tree, folder: str) -> list[str]:
    """The splits of a DatasetDict that `save_to_disk` wrote; empty for any other folder."""
    if not tree.is_file(path := f"{folder}/dataset_dict.json"):
        return []
    try:
        return list(map(str, json.loads(tree.read(path))["splits"]))
    except (ValueError, KeyError, TypeError):
        return []


def _saved_split(source: DataSet, folder: str, names: list[str], split: str | None) -> str:
    """The split of a DatasetDict to read; says which are left out."""
    chosen = split or (names[0] if len(names) == 1 else split_names.TRAIN)
    if chosen not in names:
        message = f"has the splits {', '.join(names)}: choose one, for example data.path={folder}:{names[0]}"
        raise DataError(Problem("data.path", source.path, message))
    others = [name for name in names if name != chosen]
    if others and split is None:
        hint = f"to read one of them: data.path={folder}:{others[0]}"
        log_once(f"files     {source.path}: reads the split {chosen}; leaves out {_listed(others)} ({hint})")
    return chosen


def _refuse_dataset_info(source: DataSet, tree: Tree, folder: str) -> None:
    """Raise DataError for LLaMA-Factory's folder of sets: its dataset_info.json says which file is which set."""
    if not tree.is_file(path := f"{folder}/dataset_info.json"):
        return
    try:
        content = json.loads(tree.read(path))
    except ValueError:
        return
    entries = content if isinstance(content, dict) else {}
    names = [
        name for name, item in entries.items() if isinstance(item, dict) and {"file_name", "hf_hub_url"} & set(item)
    ]
    if names:
        message = f"has LLaMA-Factory's list of sets. Choose one: data.path={tree.shown(path)} data.subset={names[0]}"
        message += f" (it has {_listed(names)})" if len(names) > 1 else ""
        raise DataError(Problem("data.path", source.path, message))


def _choose(source: DataSet, tree: Tree, folder: str, paths: list[str], split: str | None) -> list[str]:
    """The files of one split; says which are left out."""
    names = {_relative(path, folder): path for path in paths}
    try:
        chosen = split_names.choose(list(names), split)
    except split_names.UnclearSplit as error:
        first, shown = next(iter(names)), tree.shown(folder)
        message = f"holds {_listed(list(names))}, but {error}. Name one file, data.path={tree.shown(names[first])}, "
        message += f"or several, data.path={shown} {_as_files(list(names)[:1])}"
        raise DataError(Problem("data.path", source.path, message)) from error
    left_out = [name for name in names if name not in set(chosen)]
    if left_out and split is None:
        hint = f"to read them: data.path={tree.shown(folder)} {_as_files(left_out[:1])}"
        log_once(f"files     {source.path}: reads {_listed(chosen)}; leaves out {_listed(left_out)} ({hint})")
    return [names[name] for name in chosen]


def _as_files(names: list[str]) -> str:
    """data.files as it is typed on the command line."""
    return "'data.files=[" + ",".join(f'"{glob.escape(name)}"' for name in names) + "]'"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _relative(path: str, folder: str) -> str:
    return path.removeprefix(folder).lstrip("/") if folder else path


def _ending(path: str) -> str:
    return DataFile(path, Path(path).name, path).format
