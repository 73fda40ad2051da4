"""Finds and reads the files of a DeepSpeed checkpoint, and checks that there is one of each rank."""

import os
import re
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError
from jobs.tensor_io import safe_pickle
from jobs.tensor_io.untrusted import check_inside

MAX_RANKS = 10**6


def stage_of_config(model_state: dict[str, Any]) -> int | None:
    """The ZeRO stage that the checkpoint says it was written with; None if it does not say."""
    config = model_state.get("ds_config")
    if not isinstance(config, dict):
        return None if model_state.get("param_shapes") else 0
    zero = config.get("zero_optimization")
    return int(zero.get("stage", 0)) if isinstance(zero, dict) else 0


def check_not_model_parallel(folder: Path, paths: list[Path]) -> None:
    """Raise RunError for models that are cut by tensor or pipeline parallelism, or DeepSpeed's own experts."""
    others = [path.name for path in paths if not _MODEL_FILE.fullmatch(path.name)]
    others += [path.name for path in paths if (match := _MODEL_FILE.fullmatch(path.name)) and int(match["model_rank"])]
    if others:
        message = (
            f"was written with tensor or pipeline parallelism or DeepSpeed's own experts ({others[0]}), which are not joined here: "
            "save the model in one piece with what trained it (save_16bit_model, or gather the weights and save_pretrained)"
        )
        raise RunError(Problem("checkpoint", folder, message))


_MODEL_FILE = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_(?P<model_rank>\d+)_model_states\.pt")


def files(folder: Path, pattern: str) -> list[Path]:
    """Sorted by rank: by the numbers in the name, not by its letters."""
    paths = sorted(folder.glob(pattern), key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])
    if not paths:
        raise RunError(Problem("checkpoint", folder, f"has no {pattern}: it was not written completely"))
    return paths


def load(path: Path, key: str | None = None) -> Any:
    """The object in a file, or one entry of it. Raises RunError if it is damaged, or a link that leads out of the folder."""
    check_inside(path, path.parent)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = safe_pickle.load_archive(descriptor, str(path))
    finally:
        os.close(descriptor)
    if key is not None and (not isinstance(content, dict) or key not in content):
        raise RunError(Problem("checkpoint", path, f"has no {key}: it was not written by DeepSpeed, or is damaged"))
    return content if key is None else content[key]


def check_ranks(folder: Path, paths: list[Path], state: dict[str, Any]) -> None:
    """Raise RunError unless there is a file of each rank. DeepSpeed numbers files by rank; `partition_count` says how many."""
    count = state["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if count > MAX_RANKS:
        raise RunError(Problem("checkpoint", paths[0], f"says that {count:.0e} ranks wrote it: it is damaged"))
    names = {path.name for path in paths}
    example = paths[0].name
    expected = [re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{rank}", example) for rank in range(count)]
    if missing := [name for name in expected if name not in names]:
        message = f"is missing; files of {len(missing)} of {count} ranks are: copy them too, or merge another step"
        raise RunError(Problem("checkpoint", folder / missing[0], message))
    if len(paths) > count:
        message = f"has {len(paths)} such files for {count} ranks: remove the files of another checkpoint"
        raise RunError(Problem("checkpoint", folder, message))


def check_model_files(folder: Path, model_paths: list[Path], optimizer_paths: list[Path]) -> None:
    """Raise RunError unless there is a model file for each optimizer file."""
    names = {path.name for path in model_paths}
    for path in optimizer_paths:
        if (name := path.name.removeprefix("bf16_").replace("optim_states", "model_states")) not in names:
            raise RunError(Problem("checkpoint", folder / name, "is missing: copy it too, or merge another step"))
