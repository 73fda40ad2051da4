"""Recognizes the format of a checkpoint folder, written by Muster or another program, and lists its tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError
from jobs.tensor_io import bounds, dcp, deepspeed, safetensors
from jobs.tensor_io.dtypes import Dtype
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.untrusted import check_inside, read_object, refused_if_damaged

OPENED = (".metadata", "latest", "latest_universal")
OPENED_SUFFIXES = (".safetensors", ".json", ".pt", ".distcp")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint."""

    folder: Path
    """That of the files; it may be inside the folder that was asked for."""
    kind: str
    """Format, as it is shown to the user."""
    tensors: dict[str, StoredTensor]
    """By the names under which they were saved."""
    excludes_frozen: bool = False
    """Whether it says that it was saved without frozen weights, so that those it lacks were frozen."""
    compute_dtype: Dtype | None = None
    """In which training had the frozen weights, if it says so."""


def open_checkpoint(folder: Path) -> Checkpoint:
    """Recognize the format of `folder` and list its tensors.

    Raises RunError if it is not a complete checkpoint, or if a file of it is damaged or outside the folder.
    """
    if not folder.is_dir():
        raise RunError(Problem("checkpoint", folder, "is not a folder"))
    with refused_if_damaged(folder):
        checkpoint = _open(folder)
        check_inside(checkpoint.folder, folder)
        bounds.check(checkpoint.folder, checkpoint.tensors)
    return checkpoint


def _open(folder: Path) -> Checkpoint:
    for candidate in [folder, *sorted(folder.glob("pytorch_model_fsdp_*"))]:
        _check_links(candidate, folder)
        if (candidate / ".metadata").exists() or any(candidate.glob("*.distcp")):
            return Checkpoint(candidate, "DCP", dcp.find_tensors(candidate))
    if (zero_folder := _zero_folder(folder)) is not None:
        weights = deepspeed.find_weights(zero_folder)
        return Checkpoint(zero_folder, "ZeRO", *weights)
    if (folder / "adapter_config.json").exists():
        return Checkpoint(folder, "adapter", safetensors.find_tensors(folder, "adapter_model"))
    if any(folder.glob("*.safetensors")):
        return Checkpoint(folder, "safetensors", safetensors.find_tensors(folder))
    message = (
        "is not a checkpoint: it has no .metadata (FSDP), no latest and no *_optim_states.pt (DeepSpeed), and no "
        "*.safetensors; name the folder that holds these files"
    )
    raise RunError(Problem("checkpoint", folder, message))


def _check_links(folder: Path, home: Path) -> None:
    """Raise RunError if a file that may be opened is a link to a file outside `home`."""
    for path in folder.iterdir():
        if path.is_symlink() and (path.suffix in OPENED_SUFFIXES or path.name in OPENED):
            check_inside(path, home)


def _zero_folder(folder: Path) -> Path | None:
    """The folder with the files of a ZeRO checkpoint: this one, or the one that DeepSpeed's file `latest` names."""
    if any(folder.glob("*_optim_states.pt")) or any(folder.glob("*mp_rank_*_model_states.pt")):
        return folder
    for pointer in (folder / "latest", folder / "latest_universal"):
        if pointer.is_file():
            named = folder / pointer.read_text(encoding="utf-8").strip()
            check_inside(named, folder)
            if not named.is_dir():
                raise RunError(Problem("checkpoint", named, f"is missing, but {pointer} names it: copy it too"))
            return named
    return None


def file_versions(tensors: dict[str, StoredTensor]) -> dict[str, list[int]]:
    """Path -> [bytes, modification time in ns] of every file that is read, to notice later that one was replaced."""
    paths = {extent.path for stored in tensors.values() for extent in stored.extents}
    states = {path: Path(path).stat() for path in sorted(paths)}
    return {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}


def adapter_settings(folder: Path) -> dict[str, Any] | None:
    """adapter_config.json of the checkpoint's folder, or else of the folder above."""
    candidates = (read_object(parent / "adapter_config.json") for parent in (folder, folder.parent))
    return next((settings for settings in candidates if settings), None)
