"""The parts of a merge one by one, adapters compared with PEFT's own merge, and errors: messages and leftovers."""

import errno
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conf.errors import DataError, RunError, UserError
from conf.files import read_json
from jobs.consolidation import execute, external, lora, output_folder, plan, prefixes, weight_names, workers
from jobs.tensor_io import dtypes, layout, safe_pickle, safetensors
from jobs.tensor_io.layout import Extent, StoredTensor
from jobs.tensor_io.reader import OpenFiles, Reader
from tests.conftest import ROOT
from tests.jobs import shards

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model in bf16."""
    folder = tmp_path_factory.mktemp("base") / "gqa"
    shards.build("gqa").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An FSDP checkpoint of one process, with other weights than the base."""
    folder = tmp_path_factory.mktemp("checkpoint")
    state = {name: value + 0.01 for name, value in shards.build("gqa").state_dict().items()}
    dcp.save({"model": state}, checkpoint_id=folder / "fsdp", no_dist=True)
    return folder / "fsdp"


@pytest.fixture
def mine(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    subprocess.run(["cp", "-r", checkpoint, tmp_path / "mine"], check=True)
    return tmp_path / "mine"


def run(source, out, *words):
    external.main([str(source), "--out", str(out), *map(str, words)])
    return read_json(out / "muster.json")


# Ranges of bytes


@pytest.mark.parametrize("seed", range(40))
def test_blocks_of_random_chunks_give_the_tensor(seed, tmp_path) -> None:
    """A tensor cut into a random grid of boxes, each stored row by row, read back in blocks of a random size."""
    chance = random.Random(seed)
    shape = tuple(chance.randint(1, 7) for _ in range(chance.randint(1, 4)))
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    cut = [sorted({0, size, *(chance.randint(0, size) for _ in range(chance.randint(0, 2)))}) for size in shape]
    boxes = [layout.Chunk((), ())]
    for edges in cut:
        spans = list(zip(edges, edges[1:], strict=False))
        boxes = [layout.Chunk(starts + (a,), sizes + (b - a,)) for starts, sizes in boxes for a, b in spans]
    chance.shuffle(boxes)
    width, rectangles = layout.rectangles(shape, boxes)
    found = []
    for number, ((starts, sizes), rows) in enumerate(zip(boxes, rectangles, strict=True)):
        path = tmp_path / str(number)
        path.write_bytes(
            whole[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))].contiguous().numpy().tobytes()
        )
        found += [
            Extent(str(path), 0, row, count, column, columns, 0, skip) for row, count, column, columns, skip in rows
        ]
    stored = StoredTensor(shape, dtypes.FP32, tuple(sorted(found, key=lambda item: (item.row, item.column))), width)
    files = OpenFiles()
    reader, flat = Reader(files), torch.full((whole.numel(),), -1.0)
    start, stop = sorted(chance.randint(0, whole.numel()) for _ in range(2))
    for first, last in layout.blocks(start, stop, width, chance.randint(1, 30)):
        reader.fill(stored, first, dtypes.as_bytes(flat[first:last]))
    files.close()
    assert torch.equal(flat[start:stop], whole.view(-1)[start:stop])


def test_a_header_is_what_safetensors_reads(tmp_path) -> None:
    tensors = [("a", (3, 5), dtypes.BF16), ("b", (), dtypes.FP32), ("c", (0, 4), dtypes.TORCH["int64"])]
    head, offsets, size = safetensors.make_header(tensors)
    assert offsets[0] % 4096 == 0
    (tmp_path / "x.safetensors").write_bytes(head + bytes(size - len(head)))
    assert {
        name: (tuple(value.shape), value.dtype) for name, value in load_file(tmp_path / "x.safetensors").items()
    } == {name: (shape, dtype.torch) for name, shape, dtype in tensors}


def test_numpy_rounds_as_torch_does(monkeypatch) -> None:
    """For every exponent and sign: bits below, at and above the midpoint of two results; also infinities and NaN."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    bits = ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] | low).ravel()
    ours, theirs = (
        dtypes.as_tensor(
            way(bits.view(np.uint8), dtypes.FP32, dtypes.BF16, np.empty(2 * bits.size, np.uint8)), dtypes.BF16
        )
        for way in (dtypes.cast_with_numpy, dtypes.cast_with_torch)
    )
    whole = ~theirs.isnan()  # torch's vectorized code and its scalar code produce different NaNs
    assert torch.equal(ours[whole].view(torch.int16), theirs[whole].view(torch.int16))
    assert torch.equal(ours.isnan(), theirs.isnan()) and whole.sum() > 300_000
    pairs = {(dtypes.FP32, dtypes.BF16)}
    with dtypes.best_cast(pairs, 1) as way:
        assert way is dtypes.cast_with_torch  # which is already imported
    monkeypatch.delitem(sys.modules, "torch")
    with dtypes.best_cast(pairs, 1) as way:
        assert way is dtypes.cast_with_numpy


def test_a_pickle_cannot_call_anything(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/called",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RunError, match="not the metadata"):
        safe_pickle.load_dcp_metadata(tmp_path / ".metadata")
    torch.save({"weights": torch.ones(3), "evil": Evil()}, tmp_path / "evil.pt")
    with (tmp_path / "evil.pt").open("rb") as file:
        found = safe_pickle.load_archive(file.fileno(), "evil.pt")
    assert found["weights"].shape == (3,)
    assert not (tmp_path / "called").exists()


def test_the_offset_of_a_storage_is_right(tmp_path) -> None:
    """Views, parameters and several dtypes, in an archive that begins in the middle of a file."""
    values = {
        "view": torch.arange(12.0)[4:8], "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "bf16": torch.ones(5, dtype=torch.bfloat16), "fp8": torch.ones(4).to(torch.float8_e4m3fn), "turned": torch.ones(2, 3).T,
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(values, buffer)
    (tmp_path / "x").write_bytes(b"before" + buffer.getvalue() + b"after")
    with (tmp_path / "x").open("rb") as file:
        found = safe_pickle.load_archive(file.fileno(), "x", 6, len(buffer.getvalue()))
        for name, saved in found.items():
            assert (saved.dtype.torch, saved.shape) == (values[name].dtype, tuple(values[name].shape))
            if saved.contiguous:
                raw = os.pread(file.fileno(), saved.numel * saved.dtype.itemsize, saved.offset)
                assert raw == values[name].detach().contiguous().view(torch.uint8).numpy().tobytes()
    assert not found["turned"].contiguous


# Names


@pytest.mark.parametrize("kind", sorted(weight_names.STORED_AS_USED))
def test_model_families_that_are_stored_as_they_are_used(kind) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **shards.SMALL, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        blueprint = weight_names.blueprint_of_model(AutoModelForCausalLM.from_config(config))
    assert all((saved.name, saved.shape) == (saved.live, blueprint.live[saved.live]) for saved in blueprint.saved)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_fused_experts_are_runs_of_live_weights(kind) -> None:
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion

    experts = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32}
    config = AutoConfig.for_model(kind, **shards.SMALL, **experts, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    real = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        blueprint = weight_names.blueprint_of_model(AutoModelForCausalLM.from_config(config))
    state = {name: value for name, value in real.state_dict().items() if name in blueprint.live}
    wanted = revert_weight_conversion(real, dict(state))
    assert {saved.name for saved in blueprint.saved} == wanted.keys()
    for saved in blueprint.saved:
        run = state[saved.live].reshape(-1)[saved.start : saved.start + wanted[saved.name].numel()]
        assert torch.equal(run.view(saved.shape), wanted[saved.name])


@pytest.mark.parametrize(
    ("key", "live"),
    [
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.embed_tokens.lora_embedding_B.default", "model.embed_tokens.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.q_proj.lora_magnitude_vector.default.weight", "q_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_live_names(key, live) -> None:
    assert weight_names.live_name(key) == live


@pytest.mark.parametrize(
    "prefix", ["", "model.", "app.model.", "module.", "state.model._orig_mod.", "_fsdp_wrapped_module."]
)
def test_prefixes_are_taken_off(prefix) -> None:
    live = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    tensors = {prefix + name: name for name in live} | {f"app.optimizer.state.{live[0]}.exp_avg": "no"}
    if not prefix:
        tensors = {name: name for name in live} | {f"optimizer.state.{live[0]}.exp_avg": "no"}
    assert prefixes.strip_prefixes(tensors, live) == prefixes.strip_prefixes(tensors) == {name: name for name in live}


# Adapters


def near(found, wanted, *sums):
    """Equal to within one unit in the last place of bf16, for the largest number in the sum."""
    size = torch.stack([value.float().abs() for value in (found, wanted, *sums)]).amax(0).clamp_min(1e-30)
    unit = 2.0 ** (torch.floor(torch.log2(size)) - 7)
    return bool(((found.float() - wanted.float()).abs() <= unit).all())


def peft_model(base, dtype=torch.bfloat16, **words):
    """A PEFT model with random numbers in everything that it trains."""
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
        LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | words),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
            elif parameter.requires_grad:
                parameter.mul_(1.1)
    return model


ADAPTERS = [
    pytest.param({}, id="lora"),
    pytest.param({"use_rslora": True}, id="rslora"),
    pytest.param({"use_dora": True}, id="dora"),
    pytest.param({"modules_to_save": ["lm_head", "embed_tokens"]}, id="modules_to_save"),
    pytest.param({"target_modules": ["q_proj", "embed_tokens"]}, id="embedding"),
    pytest.param({"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 32}}, id="alpha_pattern"),
]


@pytest.mark.parametrize("words", ADAPTERS)
def test_an_adapter_is_merged_as_peft_does(words, base, tmp_path) -> None:
    model = peft_model(base, **words)
    model.save_pretrained(tmp_path / "adapter")
    run(tmp_path / "adapter", tmp_path / "out", "--base", base, "--dtype", "bf16")
    found = load_file(tmp_path / "out/model.safetensors")
    before = load_file(base / "model.safetensors")
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float(), tmp_path / "adapter"
    )
    exact = exact.merge_and_unload().state_dict()
    theirs = model.merge_and_unload().state_dict()
    assert found.keys() == theirs.keys()
    for name, value in found.items():
        reference = exact[name].float()
        assert near(value, reference), name
        assert near(value, theirs[name], before[name], reference - before[name].float()), name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_blocks_of_rows_add_up(rslora, dora) -> None:
    a, b, weight = torch.randn(4, 24), torch.randn(33, 4), torch.randn(33, 24)
    magnitude = torch.rand(33) + 0.5 if dora else None
    update = lora.LoraUpdate(a, b, 16 / (2 if rslora else 4), magnitude)
    whole = weight + b @ a * (16 / (2 if rslora else 4))
    if magnitude is not None:
        whole = whole * (magnitude / whole.norm(dim=1))[:, None]
    merged = weight.clone()
    for row in range(0, 33, 7):
        lora.add(merged[row : row + 7], update, row)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_another_model_is_refused(base, tmp_path) -> None:
    other = shards.base("odd", tmp_path)
    peft_model(base).save_pretrained(tmp_path / "adapter")
    with pytest.raises(DataError, match="does not fit the model|another base"):
        run(tmp_path / "adapter", tmp_path / "out", "--base", other)
    assert not (tmp_path / "out").exists()


def test_a_base_whose_names_are_shorter(base, tmp_path) -> None:
    """Saved from the decoder alone: its names do not begin with `model.`."""
    (tmp_path / "short").mkdir()
    (tmp_path / "short/config.json").write_bytes((base / "config.json").read_bytes())
    weights = {name.removeprefix("model."): value for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, tmp_path / "short/model.safetensors", metadata={"format": "pt"})
    peft_model(base).save_pretrained(tmp_path / "adapter")
    found = []
    for number, folder in enumerate((base, tmp_path / "short")):
        run(tmp_path / "adapter", tmp_path / f"out{number}", "--base", folder)
        found.append((tmp_path / f"out{number}/model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_an_adapter_needs_its_base(base, tmp_path) -> None:
    peft_model(base).save_pretrained(tmp_path / "adapter")
    about = tmp_path / "adapter/adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(DataError, match="--base.*adapters"):
        run(tmp_path / "adapter", tmp_path / "out")


# The folder


def test_the_folder_is_a_model(checkpoint, base, tmp_path) -> None:
    about = run(checkpoint, tmp_path / "out", "--base", base, "--shard-gib", "0.00003", "--dtype", "fp16")
    assert about["verified"] and about["dtype"] == "fp16"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "README.md", "model.safetensors.index.json", "muster.json"} <= files
    assert not [name for name in files if name.startswith(".")]
    index = read_json(tmp_path / "out/model.safetensors.index.json")
    assert set(index["weight_map"].values()) == set(about["xxh3"]) and len(about["xxh3"]) > 3
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert model.dtype is torch.float16 and not info["missing_keys"] and not info["unexpected_keys"]
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()


def test_original_keeps_the_dtype_of_each_base_weight(checkpoint, base, tmp_path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_bytes((base / "config.json").read_bytes())
    before = load_file(base / "model.safetensors")
    mixed = {name: value if "norm" in name else value.to(torch.bfloat16) for name, value in before.items()}
    save_file(mixed, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    run(checkpoint, tmp_path / "out", "--base", tmp_path / "base", "--dtype", "original")
    found = load_file(tmp_path / "out/model.safetensors")
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in mixed.items()}


def test_an_older_result_is_moved_aside(checkpoint, tmp_path) -> None:
    run(checkpoint, tmp_path / "out")
    run(checkpoint, tmp_path / "out", "--dtype", "fp32")
    assert read_json(tmp_path / "out.1/muster.json")["dtype"] == "bf16"


def test_the_plan_is_shown_without_writing(checkpoint, tmp_path, capsys) -> None:
    external.main([str(checkpoint), "--out", str(tmp_path / "out"), "--plan"])
    assert (
        "plan      0.00 GB to read, 0.00 GB to write, 1 files" in capsys.readouterr().out
        and not (tmp_path / "out").exists()
    )


def test_a_dtype_is_the_same_object_in_another_rank() -> None:
    for dtype in dtypes.TORCH.values():
        assert pickle.loads(pickle.dumps(StoredTensor((), dtype, ()))).dtype is dtype


def test_seventy_billion_weights_are_planned_in_seconds() -> None:
    kinds = {"q": (8192, 8192), "k": (1024, 8192), "up": (28672, 8192), "gate": (28672, 8192), "down": (8192, 28672)}
    every = {f"layers.{layer}.{kind}": shape for layer in range(80) for kind, shape in kinds.items()}
    began = time.monotonic()
    sources = {}
    for name, shape in every.items():
        width, boxes = layout.rectangles(
            shape, [layout.Chunk((rank * shape[0] // 64, 0), (shape[0] // 64, shape[1])) for rank in range(64)]
        )
        rows = tuple(Extent(f"/shards/{rank}", 0, *box[0][:4]) for rank, box in enumerate(boxes))
        sources[name] = StoredTensor(shape, dtypes.FP32, rows, width)
    outputs = [plan.Output(name, stored.shape, dtypes.BF16, name) for name, stored in sources.items()]
    made = plan.make_plan(outputs, sources, shard_bytes=5 * 2**30)
    assert len(made.digest()) == 64 and made.read_bytes == 2 * (
        made.written_bytes - sum(map(len, made.headers.values()))
    )
    assert 24 <= len(made.sizes) <= 30
    assert time.monotonic() - began < 20
    files = [task.placed[0].file for task in workers.interleaved(made, {"model-00002-of-00028.safetensors"})]
    assert len(files) == len(made.tasks) and len(set(files[:4])) == 4
    last = {file: at for at, file in enumerate(files)}
    assert all(len(set(files[: at + 1]) - {f for f in last if last[f] <= at}) <= 4 for at in range(len(files)))


# Errors


def refused(source, out, message, *words) -> None:
    """Merging fails with this message, and leaves neither a result nor a part of one."""
    with pytest.raises(UserError, match=message):
        run(source, out, *words)
    assert not out.exists() and not (out.parent / f".{out.name}.partial").exists()


def test_a_missing_shard_is_named(mine, tmp_path) -> None:
    (mine / "__0_0.distcp").unlink()
    refused(mine, tmp_path / "out", r"__0_0\.distcp: is missing")


def test_missing_metadata_is_named(mine, tmp_path) -> None:
    (mine / ".metadata").unlink()
    refused(mine, tmp_path / "out", r"\.metadata: is missing")


def test_a_shard_cut_short_is_named(mine, tmp_path) -> None:
    os.truncate(mine / "__0_0.distcp", 5000)
    refused(mine, tmp_path / "out", r"__0_0\.distcp: is cut short: 5000 of")


def test_damaged_metadata_is_named(mine, tmp_path) -> None:
    (mine / ".metadata").write_bytes((mine / ".metadata").read_bytes()[:-300])
    refused(mine, tmp_path / "out", r"\.metadata: (cannot be read|is not)")


def test_a_damaged_archive_is_named(mine, tmp_path) -> None:
    shard = mine / "__0_0.distcp"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    refused(mine, tmp_path / "out", r"__0_0\.distcp: is cut short or damaged")


def test_another_base_is_refused(mine, tmp_path) -> None:
    refused(mine, tmp_path / "out", "does not fit the model", "--base", shards.base("odd", tmp_path))


def test_no_checkpoint_at_all(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "is not a checkpoint")


def test_too_little_space_is_reported_before_anything_is_written(mine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        output_folder.shutil, "disk_usage", lambda _: os.terminal_size((0, 0)) and type("Usage", (), {"free": 1000})
    )
    refused(mine, tmp_path / "out", r"needs 0\.00 GiB, but 0\.00 GiB are free")


def test_a_disk_that_fills_up_during_the_merge(mine, tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workers, "write", full)
    refused(mine, tmp_path / "out", "the disk or your quota is full")


def test_files_that_may_not_grow(mine, tmp_path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        refused(mine, tmp_path / "out", "files of this size are not allowed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_target_that_cannot_be_written(mine, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written: choose a folder"):
        run(mine, tmp_path / "file/out")


def test_a_result_that_reads_back_wrong_is_not_published(mine, tmp_path, monkeypatch) -> None:
    real = workers.write

    def flipped(descriptor, offset, view):
        data = bytearray(view)
        data[0] ^= 1
        real(descriptor, offset, memoryview(data))

    monkeypatch.setattr(workers, "write", flipped)
    refused(mine, tmp_path / "out", "read back differs")


def test_two_processes_cannot_write_the_same_result(mine, tmp_path) -> None:
    with output_folder.locked_partial_folder(tmp_path / "out"), pytest.raises(RunError, match="another process"):
        run(mine, tmp_path / "out")


def carry_out(todo, target, checkpoint) -> None:
    execute.execute(todo, target, threads=2, checkpoint=checkpoint, describe=lambda _: None, muster_json={})


def test_a_flipped_bit_is_found_by_the_fingerprint(mine, tmp_path) -> None:
    from jobs.checkpoint.checkpointing import fingerprint
    from jobs.tensor_io.open_checkpoint import open_checkpoint

    state = {name: value + 0.01 for name, value in shards.build("gqa").state_dict().items()}
    prints = {name: fingerprint(value) for name, value in state.items()}
    source = open_checkpoint(mine)
    stored = prefixes.strip_prefixes(source.tensors)
    outputs = [plan.Output(name, item.shape, dtypes.BF16, name) for name, item in stored.items()]
    todo = plan.make_plan(outputs, stored, shard_bytes=200_000, fingerprints=prints)
    carry_out(todo, tmp_path / "good", mine)
    assert read_json(tmp_path / "good/muster.json")["verified"]
    name, item = "lm_head.weight", stored["lm_head.weight"]
    with (mine / "__0_0.distcp").open("r+b") as file:
        saved = safe_pickle.load_archive(file.fileno(), "", item.extents[0].offset, item.extents[0].archive)
        file.seek(saved.offset + 4001)
        byte = file.read(1)[0]
        file.seek(saved.offset + 4001)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(RunError, match=f"weight {name} differs from that in training"):
        carry_out(todo, tmp_path / "bad", mine)
    assert not (tmp_path / "bad").exists() and not (tmp_path / ".bad.partial").exists()


# Kills


def test_finished_files_survive_a_kill(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    """A process ends without cleaning up; the next start keeps the finished files and writes only the others."""
    words = [str(checkpoint), "--out", str(tmp_path / "out"), "--shard-gib", "0.00003", "--workers", "2"]
    external.main(words)
    whole = contents(tmp_path / "out")
    subprocess.run(["rm", "-r", tmp_path / "out"], check=True)
    code = f"""
import os, sys
from jobs.consolidation import external, output_folder
real = output_folder.write_record
count = [0]
def record(*words):
    real(*words)
    count[0] += 1
    if count[0] == 3:
        os._exit(9)
output_folder.write_record = record
external.main({words!r})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 9
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    external.main(words)
    assert "files were finished by an earlier start, and are kept" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole


@pytest.mark.proof
def test_killed_at_any_moment_the_next_start_gives_the_same_bytes(checkpoint, base, tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "jobs.consolidate",
        checkpoint,
        "--out",
        tmp_path / "out",
        "--base",
        base,
        "--shard-gib",
        "0.00003",
    ]

    def start():
        began = time.monotonic()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return time.monotonic() - began

    start()
    whole = contents(tmp_path / "out")
    subprocess.run(["rm", "-r", tmp_path / "out"], check=True)
    seconds = start()
    chance = random.Random(0)
    for _ in range(20):
        subprocess.run(["rm", "-rf", tmp_path / "out"], check=True)
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
            time.sleep(seconds * chance.uniform(0.7, 1.0))
            started.send_signal(signal.SIGKILL)
        assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == whole
    start()
    assert {name: value for name, value in contents(tmp_path / "out").items()} == whole


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
