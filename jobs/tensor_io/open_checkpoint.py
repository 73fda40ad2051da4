"""Recognises a checkpoint folder, Muster's or another program's, and opens it."""

from dataclasses import dataclass
from pathlib import Path

from conf.errors import Problem, RunError
from conf.files import read_json
from jobs.tensor_io import dcp, deepspeed, safetensors
from jobs.tensor_io.layout import Stored


@dataclass(frozen=True)
class Source:
    """A checkpoint that is open: what it holds, by the names it was saved under."""

    folder: Path
    kind: str
    tensors: dict[str, Stored]

    def manifest(self) -> dict[str, list[int]]:
        """Size and time of every file that is read: a result made of other files is made anew."""
        return manifest(self.tensors)


def manifest(tensors: dict[str, Stored]) -> dict[str, list[int]]:
    paths = {extent.path for stored in tensors.values() for extent in stored.extents}
    states = {path: Path(path).stat() for path in sorted(paths)}
    return {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}


def source(folder: Path) -> Source:
    """Raises RunError when this is no checkpoint, or one that is not whole."""
    if not folder.is_dir():
        raise RunError(Problem("checkpoint", folder, "is no folder"))
    for place in [folder, *sorted(folder.glob("pytorch_model_fsdp_*"))]:
        if (place / ".metadata").exists() or any(place.glob("*.distcp")):
            return Source(place, "DCP", dcp.tensors(place))
    if (place := _zero(folder)) is not None:
        return Source(place, "ZeRO", deepspeed.tensors(place))
    if (folder / "adapter_config.json").exists():
        return Source(folder, "adapter", safetensors.tensors(folder, "adapter_model"))
    if any(folder.glob("*.safetensors")):
        return Source(folder, "safetensors", safetensors.tensors(folder))
    said = "is no checkpoint: it has no .metadata (FSDP), latest or *_optim_states.pt (DeepSpeed), or *.safetensors"
    raise RunError(Problem("checkpoint", folder, said))


def _zero(folder: Path) -> Path | None:
    """The folder with a ZeRO checkpoint's files: this one, or the one that DeepSpeed's `latest` names."""
    if any(folder.glob("*_optim_states.pt")):
        return folder
    if not (folder / "latest").is_file():
        return None
    place = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    if not place.is_dir():
        raise RunError(Problem("checkpoint", place, f"is missing, though {folder / 'latest'} names it"))
    return place


def adapter_settings(folder: Path) -> dict | None:
    """The nearest adapter_config.json: of the checkpoint, or of the folder that it lies in."""
    return next(
        (found for place in (folder, folder.parent) if (found := read_json(place / "adapter_config.json"))), None
    )
