"""Finds out whether a checkpoint of a program of the user was cut short by a kill. Only what proves it counts."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from conf import safetensors_file

MARK = ".unfinished"
"""A file in a checkpoint's folder for as long as it is written: see muster/program.py."""
OF_TRAINER = "trainer_state.json"
"""What transformers.Trainer writes last."""
OF_RAY = "checkpoint_manager_snapshot.json"
"""The checkpoints that Ray Train knows, and would continue from."""
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")
OF_DEEPSPEED = ("*_optim_states.pt", "*_model_states.pt")


def why_unfinished(folder: Path) -> str:
    """Return what shows that the writing of a checkpoint did not end; empty if nothing does.

    A file that is missing counts only where its format demands it: the program may save as little as it likes.
    """
    try:
        return next(_signs(folder), "")
    except OSError:  # a file that is being replaced, or that this user may not read
        return ""


def _signs(folder: Path) -> Iterator[str]:
    if (folder / MARK).exists():
        yield f"it has the mark {MARK}"
    if not any(folder.iterdir()):
        yield "it is empty"
    yield from _unknown_to_program(folder)
    for inside in (folder, *(path for path in sorted(folder.rglob("*")) if path.is_dir())):
        names = {path.name for path in inside.iterdir()}
        if any(name.endswith(".distcp") for name in names) and ".metadata" not in names:
            yield f"{inside.name} has no .metadata, which torch writes last"
        if inside != folder and "latest" not in _names(inside.parent) and _is_of_deepspeed(inside):
            yield f"{inside.parent.name} has no file latest, which DeepSpeed writes last"
        yield from _lacking_shards(names)
        yield from (
            f"{path.name} is cut short" for path in sorted(inside.iterdir()) if path.is_file() and _is_cut(path)
        )


def _unknown_to_program(folder: Path) -> Iterator[str]:
    """What the other checkpoints of the same program have, or say."""
    stem = folder.name.rstrip("0123456789")
    others = [
        path for path in folder.parent.glob(f"{stem}*") if path.name.removeprefix(stem).isdigit() and path != folder
    ]
    if not (folder / OF_TRAINER).exists() and any((path / OF_TRAINER).exists() for path in others):
        yield f"it has no {OF_TRAINER}, which the Trainer writes last"
    if (snapshot := folder.parent / OF_RAY).is_file() and f'"{folder.name}"' not in snapshot.read_text(
        encoding="utf-8"
    ):
        yield f"Ray Train does not know it ({OF_RAY})"
    pointer = folder.parent / "latest"
    if (
        _is_of_deepspeed(folder)
        and pointer.is_file()
        and _number(pointer.read_text(encoding="utf-8")) < _number(folder.name)
    ):
        yield "DeepSpeed's file latest names an earlier one"


def _number(name: str) -> int:
    return int((re.findall(r"\d+", name) or ["0"])[-1])


def _is_of_deepspeed(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in OF_DEEPSPEED)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _lacking_shards(names: set[str]) -> Iterator[str]:
    """The shards of Hugging Face files that are numbered `00001-of-00003`."""
    shards = [match for name in sorted(names) if (match := SHARD.fullmatch(name))]
    for match in shards:
        count = int(match["count"])
        same = {item["number"] for item in shards if item.group("stem", "count") == match.group("stem", "count")}
        if len(same) < count:
            yield f"it has {len(same)} of {count} shards of {match['stem']}{match['suffix']}"


def _is_cut(path: Path) -> bool:
    """Whether a file ends before its format says."""
    if path.suffix == ".safetensors":
        return safetensors_file.is_cut_short(path)
    if path.name == OF_TRAINER or path.name.endswith(".index.json"):
        with suppress(ValueError):
            json.loads(path.read_text(encoding="utf-8"))
            return False
        return True
    if path.suffix in TORCH_SUFFIXES:
        with path.open("rb") as file:
            start = file.read(2)
        return not start or (start == b"PK" and not zipfile.is_zipfile(path))
    return False
