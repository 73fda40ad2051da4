"""Checkpoints that somebody else wrote: none is read outside its folder, runs code, takes much memory or ends in a traceback."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import filesystem, metadata

from conf.errors import UserError
from jobs.tensor_io.open_checkpoint import open_checkpoint
from tests.conftest import ROOT
from tests.jobs.tensor_io import fuzz

SHAPES = {"embed.weight": (12, 8), "layers.0.weight": (8, 8), "layers.0.bias": (8,)}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def save_whole(folder: Path) -> None:
    """DCP of one process."""
    with warnings.catch_warnings(action="ignore"):  # that there is no process group
        dcp.save(weights(), checkpoint_id=folder)


def save_cut(folder: Path) -> None:
    """DCP of two ranks, which have the left and the right half of every matrix."""
    folder.mkdir()
    state, infos = {}, {}
    files = [bytearray(), bytearray()]
    for name, whole in weights().items():
        chunks = []
        for rank, part in enumerate(whole.chunk(2, -1)):
            archive = io.BytesIO()
            torch.save(part.contiguous().clone(), archive)
            first = torch.Size([*[0] * (whole.ndim - 1), rank * part.shape[-1]])
            chunks.append(metadata.ChunkStorageMetadata(first, part.shape))
            info = filesystem._StorageInfo(f"__{rank}_0.distcp", len(files[rank]), len(archive.getvalue()))
            infos[metadata.MetadataIndex(name, first)] = info
            files[rank] += archive.getvalue()
        state[name] = metadata.TensorStorageMetadata(metadata.TensorProperties(), whole.shape, chunks)
    for rank, content in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata.Metadata(state, storage_data=infos)))


def save_zero(folder: Path, stage: int) -> None:
    """ZeRO-1 or ZeRO-3 of two ranks, with the names and the layout of DeepSpeed's files."""
    inner = folder / "global_step1"
    inner.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    shapes = [OrderedDict((name, torch.Size(shape)) for name, shape in SHAPES.items())]
    model = {
        "module": {} if stage == 3 else weights(),
        "param_shapes": shapes,
        "buffer_names": [],
        "shared_params": {"head.weight": "embed.weight"},
        "ds_config": {"zero_optimization": {"stage": stage}},
    }
    flat = torch.cat([value.reshape(-1) for value in weights().values()])
    for rank in range(2):
        if stage == 3 or rank == 0:
            name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            torch.save(model, inner / f"{name}_model_states.pt")
        parts = [value.reshape(-1).chunk(2)[rank] for value in weights().values()]
        part = (torch.cat(parts) if stage == 3 else flat.chunk(2)[rank]).clone()
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {"zero_stage": stage, "partition_count": 2, key: [part]}
        torch.save({"optimizer_state_dict": state}, inner / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def save_files(folder: Path) -> None:
    """Two safetensors files with an index."""
    folder.mkdir()
    names = {name: f"model-0000{number + 1}-of-00003.safetensors" for number, name in enumerate(SHAPES)}
    for name, file in names.items():
        save_file({name: weights()[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/whole, cut, zero1, zero3, files: checkpoints of the same weights. Beside it, a file that must not be opened."""
    folder = tmp_path_factory.mktemp("fuzz") / "seeds"
    folder.mkdir()
    save_whole(folder / "whole")
    save_cut(folder / "cut")
    save_zero(folder / "zero1", 1)
    save_zero(folder / "zero3", 3)
    save_files(folder / "files")
    outside = folder.parent / "outside"
    outside.mkdir()
    save_file({"secret": torch.ones(64)}, outside / "secret.safetensors")
    (outside / "secret").write_text("secret")
    return folder


def test_the_whole_ones_are_read(seeds: Path) -> None:
    for folder in sorted(seeds.iterdir()):
        tensors = open_checkpoint(folder).tensors
        assert {name: stored.shape for name, stored in tensors.items() if name in SHAPES} == SHAPES
        assert fuzz.read_all(folder) >= sum(value.nbytes for value in weights().values())


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.proof)])
def test_damaged_checkpoints_are_refused_with_a_message(seeds: Path, tmp_path: Path, count: int) -> None:
    for name in ("seeds", "outside"):
        shutil.copytree(seeds.parent / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.tensor_io.fuzz", tmp_path / "seeds", str(count)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["refused"] > count / 3
    assert result["read"] > 0, "no damage was harmless, so the reading itself is not tested"
    assert result["grown_mib"] < 64


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fuzz.read_all(folder)


@pytest.fixture
def copied(seeds: Path, tmp_path: Path) -> Path:
    """Copies of the seeds, to damage, and the folder outside."""
    shutil.copytree(seeds.parent, tmp_path / "copied")
    return tmp_path / "copied/seeds"


@pytest.mark.site(
    case="a checkpoint of others has links to files outside its folder",
    before="the files were read",
    after="refused, with the link and where it leads",
)
@pytest.mark.parametrize(
    "path",
    [
        "whole/.metadata",
        "whole/__0_0.distcp",
        "zero1/latest",
        "zero1/global_step1/mp_rank_00_model_states.pt",
        "zero3/global_step1",
        "files/model.safetensors.index.json",
        "files/model-00002-of-00003.safetensors",
    ],
)
def test_a_link_that_leads_out_is_refused(copied: Path, path: str) -> None:
    place = copied / path
    moved = copied.parent / "outside" / place.name
    place.rename(moved)
    place.symlink_to(moved)
    refused(copied / Path(path).parts[0], "leads out of|outside its folder")


def test_a_link_inside_is_followed_also_in_the_cache_of_the_hub(copied: Path) -> None:
    snapshot = copied / "models--a--b/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    (copied / "files").rename(snapshot)
    (copied / "models--a--b/blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = copied / f"models--a--b/blobs/{number}"
        path.rename(blob)
        path.symlink_to(f"../../blobs/{number}")
    assert fuzz.read_all(snapshot) > 0
    (copied / "whole/__0_0.distcp").rename(copied / "whole/other")
    (copied / "whole/__0_0.distcp").symlink_to("other")
    assert fuzz.read_all(copied / "whole") > 0


@pytest.mark.parametrize("name", ["../outside/secret.safetensors", "/etc/passwd", "", ".", "a\nb", 7, None, ["x"]])
def test_an_index_names_plain_files(copied: Path, name: object) -> None:
    path = copied / "files/model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"embed.weight": name}}))
    refused(copied / "files", "which is not in the folder of the model")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "{", "[" * 100_000, '"x"', "\ufeff{}"])
def test_an_index_that_is_none_is_refused(copied: Path, text: str) -> None:
    (copied / "files/model.safetensors.index.json").write_text(text)
    refused(copied / "files", "is not JSON|no weight_map|is not a JSON object")


@pytest.mark.parametrize("name", ["..", "../../outside", "/etc", "global_step1/../../outside"])
def test_the_pointer_of_deepspeed_stays_inside(copied: Path, name: str) -> None:
    (copied / "zero1/latest").write_text(name)
    refused(copied / "zero1", "leads out of")


def test_a_weight_of_a_universal_checkpoint_is_no_path(copied: Path) -> None:
    inner = copied / "zero1/global_step1"
    model = torch.load(inner / "mp_rank_00_model_states.pt", weights_only=False)
    model["param_shapes"] = [{"../../outside": torch.Size([2])}]
    torch.save(model, inner / "mp_rank_00_model_states.pt")
    (inner / "zero").mkdir()
    torch.save(torch.ones(2), copied.parent / "outside/fp32.pt")
    refused(copied / "zero1", "which is a path")


def rewrite(path: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Replace records of a torch.save archive."""
    with zipfile.ZipFile(path) as files:
        records = {name: files.read(name) for name in files.namelist()}
    with zipfile.ZipFile(path, "w", compression) as files:
        for name, content in records.items():
            files.writestr(name, change.get(name.partition("/")[2], content))


def test_a_compressed_pickle_is_not_unpacked(copied: Path) -> None:
    path = copied / "zero1/global_step1/mp_rank_00_model_states.pt"
    rewrite(path, {"data.pkl": b"\x80\x02" + b"N0" * 50_000_000 + b"N."}, zipfile.ZIP_DEFLATED)
    refused(copied / "zero1", "a record is compressed")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x02Np2000000000\n.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
        b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"x.",
    ],
    ids=["memo", "memo in text", "bytes", "text", "old string"],
)
@pytest.mark.site(
    case="a pickle of 10 bytes asks for gigabytes",
    before="the machine's memory was taken",
    after="refused before it is loaded",
)
def test_a_small_pickle_takes_little_memory(copied: Path, data: bytes) -> None:
    (copied / "whole/.metadata").write_bytes(data)
    refused(copied / "whole", r"\.metadata: cannot be read, it is damaged \((an object|pickle data was)")
    rewrite(copied / "zero1/global_step1/mp_rank_00_model_states.pt", {"data.pkl": data})
    refused(copied / "zero1", "is cut short or damaged")


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((2**40,), (1,), 0),
        ((4, 4), (2**40, 1), 0),
        ((-2, -3), (1, 1), 0),
        ((4,), (1,), -1),
        ((97,), (1,), 0),
        ((4,), (1,), 95),
    ],
    ids=["long", "strides", "negative", "before", "one too many", "behind"],
)
def test_a_tensor_stays_in_its_storage(
    copied: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    class Lying:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.storage = tensor.untyped_storage()

        def __reduce__(self) -> tuple[object, ...]:
            storage = torch.storage.TypedStorage(wrap_storage=self.storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (storage, offset, shape, stride, False, OrderedDict())

    inner = copied / "zero1/global_step1"
    model = torch.load(inner / "mp_rank_00_model_states.pt", weights_only=False)
    model["module"]["embed.weight"] = Lying(torch.ones(96))
    torch.save(model, inner / "mp_rank_00_model_states.pt")
    refused(copied / "zero1", "a shape that cannot be|larger than its storage")


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> metadata.ChunkStorageMetadata:
    return metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


@pytest.mark.parametrize(
    "chunks",
    [
        [((0, 0), (12, 4)), ((0, 2), (12, 4))],
        [((0, 0), (12, 4))],
        [((0, 0), (12, 4)), ((0, 8), (12, 4))],
        [((0, 0), (12, 4)), ((0, 4, 0), (12, 4, 1))],
        [((0, 0), (12, 8)), ((0, 4), (12, 4))],
    ],
    ids=["overlap", "missing", "outside", "dimensions", "twice"],
)
def test_parts_cover_a_tensor_once(copied: Path, chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    path = copied / "cut/.metadata"
    content = pickle.loads(path.read_bytes())
    info = next(iter(content.storage_data.values()))
    content.state_dict_metadata["embed.weight"].chunks = [chunk(*item) for item in chunks]
    content.storage_data |= {metadata.MetadataIndex("embed.weight", torch.Size(offsets)): info for offsets, _ in chunks}
    path.write_bytes(pickle.dumps(content))
    refused(copied / "cut", "twice|lacks parts|outside its shape|does not hold|does not fit")


def write_header(path: Path, header: object, data: bytes = bytes(64), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]},
        {"dtype": 7, "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 32]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4]},
        [],
    ],
)
def test_an_entry_of_a_header_is_checked(tmp_path: Path, entry: object) -> None:
    write_header(tmp_path / "model.safetensors", {"a": entry})
    refused(tmp_path, "is not a safetensors file|is cut off|is damaged")


def test_a_header_is_checked_as_a_whole(tmp_path: Path) -> None:
    path, entry = tmp_path / "model.safetensors", {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    write_header(path, {"a": entry, "b": entry})
    refused(tmp_path, "overlaps another tensor")
    text = json.dumps(entry).encode()
    write_header(path, b'{"a":' + text + b',"a":' + text + b"}")
    refused(tmp_path, "a name is there twice")
    write_header(path, b"[" * 200_000)
    refused(tmp_path, "its header is wrong")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)  # no byte of it is on the disk
    refused(tmp_path, "is longer than 100000000")


def test_a_pickle_cannot_change_a_function_of_the_reader(copied: Path) -> None:
    from jobs.tensor_io import safe_pickle

    before = dict(vars(safe_pickle._rebuild_tensor)), safe_pickle._rebuild_tensor.__defaults__
    state = b"(N}X\x0c\x00\x00\x00__defaults__(K\x01tst"
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter", b"x\ny", b"torch\nfloat32"):
        data = b"\x80\x02c" + name + b"\n" + state + b"b."
        (copied / "whole/.metadata").write_bytes(data)
        refused(copied / "whole", "metadata")
    assert before == (dict(vars(safe_pickle._rebuild_tensor)), safe_pickle._rebuild_tensor.__defaults__)


def test_no_file_of_yours_is_copied_as_a_tokenizer(tmp_path: Path) -> None:
    from jobs.consolidation import model_card

    (tmp_path / "secret").write_text("mine")
    for name in ("checkpoint", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint/tokenizer.json").write_text("{}")
    (tmp_path / "checkpoint/tokenizer.model").symlink_to(tmp_path / "secret")
    model_card.copy_tokenizer(tmp_path / "out", [tmp_path / "checkpoint"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
