"""The job `consolidate` on checkpoints of the backends: models and adapters in every layout, compared with the live weights."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.errors import RunError
from conf.files import read_json, write_json
from conf.resolve import digest
from jobs import backends, consolidate
from jobs.checkpoint import checkpointing, manifest
from jobs.consolidation import weight_names
from jobs.distributed.process_group import process_group
from jobs.model import build, saved_names
from jobs.tensor_io.open_checkpoint import open_checkpoint
from jobs.tokenization.tokenizer import load_tokenizer
from tests.jobs.checkpoints import save
from tests.jobs.ranks import spawn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LAYOUTS = ["fsdp", "zero3", *(pytest.param(name, marks=pytest.mark.proof) for name in ("zero1", "zero2"))]
TRAIN = [
    "cluster.train.ranks_per_node=2",
    "cluster.train.gpus_per_node=0",
    "train.global_batch=4",
    "train.micro_batch=2",
]


def train(rank, config) -> None:
    """One step on random tokens, then a checkpoint with fingerprints; also saves the live weights for the test."""
    with process_group(config) as world:
        backend = backends.import_backend(config)
        engine = backend.wrap(build.build(config), config, world)
        torch.manual_seed(rank)
        tokens = torch.randint(3, 1000, (2, 32))
        backend.backward(engine, engine.module(input_ids=tokens, labels=tokens).loss, last=True)
        backend.step(engine, 1e-2)
        about = {"layout": config.parallel.name, "config": digest(config)}
        path = save(config, 1, world, lambda folder: backend.save(engine, folder), about)
        live = {name: value.clone() for name, value in backend.weights(engine)}
        if world.is_main:
            write_json(
                path / "fingerprint.json", {name: checkpointing.fingerprint(value) for name, value in live.items()}
            )
            torch.save(live, path.parent / "live.pt")


@pytest.fixture(scope="module")
def base(compose, tmp_path_factory):
    """A folder with a model in bf16, which is not the dtype of the checkpoint, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    build.build(compose("train.seed=7")).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(compose()).save_pretrained(folder)
    return folder


@pytest.fixture(params=LAYOUTS)
def run(request, compose, tmp_path):
    """`run("adapter=lora")`: the config of a run of one step, trained by two ranks."""

    def trained(*words):
        config = compose(f"run_dir={tmp_path}/run", f"parallel={request.param}", *TRAIN, *words)
        spawn(train, 2, config)
        return config, torch.load(tmp_path / "run/checkpoints/live.pt")

    return trained


def merged(config, tmp_path):
    consolidate.run(config)
    return load_file(tmp_path / "run/model/model.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_model(precision, run, tmp_path, capsys) -> None:
    config, live = run(f"train.precision={precision}")
    found = merged(config, tmp_path)
    assert f"{len(live)} weights equal those in training, bit for bit" in capsys.readouterr().out
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert found.keys() == live.keys()
    assert all(torch.equal(found[name], value.to(dtype)) for name, value in live.items())
    target = tmp_path / "run/model"
    about = read_json(target / "muster.json")
    assert (about["checkpoint"], about["dtype"], about["digest"], about["verified"]) == (
        "step-00000001", precision, digest(config), True,
    )  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype is dtype
    assert AutoTokenizer.from_pretrained(target).chat_template
    card = (target / "README.md").read_text()
    assert digest(config) in card and str(tmp_path) not in card
    consolidate.run(config)
    assert "model is there already" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["fsdp"], indirect=True)
def test_a_checkpoint_by_its_step(run, tmp_path, capsys) -> None:
    config, _ = run()
    checkpoints = tmp_path / "run/checkpoints"
    third = shutil.copytree(checkpoints / "step-00000001", checkpoints / "step-00000003") / "checkpoint.json"
    write_json(third, read_json(third) | {"step": 3})
    merged(config, tmp_path)
    assert read_json(tmp_path / "run/model/muster.json")["checkpoint"] == "step-00000003"
    config.consolidate.step = 1
    merged(config, tmp_path)
    assert read_json(tmp_path / "run/model/muster.json")["checkpoint"] == "step-00000001"
    assert "moved the older model to" in capsys.readouterr().out
    config.consolidate.step = 2
    with pytest.raises(RunError, match=r"consolidate\.step=2: is no checkpoint of this run: take one of 1, 3"):
        consolidate.run(config)
    assert (tmp_path / "run/model/muster.json").exists()


def test_an_adapter(run, base, tmp_path, capsys) -> None:
    config, live = run("adapter=lora", "model=hub", f"model.source={base}", "train.precision=bf16")
    found = merged(config, tmp_path)
    assert f"{len(live)} weights equal those in training, bit for bit" in capsys.readouterr().out
    before = load_file(base / "model.safetensors")
    assert found.keys() == before.keys()
    parts = weight_names.split_names(live).adapters
    for name, value in found.items():
        wanted = before[name].float()
        if kinds := parts.get(name.removesuffix(".weight")):
            delta = live[kinds["lora_B"]] @ live[kinds["lora_A"]]
            wanted = wanted + delta * (config.adapter.alpha / config.adapter.r)
        size = wanted.abs().clamp_min(1e-30)
        unit = 2.0 ** (torch.floor(torch.log2(size)) - 7)
        assert value.dtype is torch.bfloat16 and ((value.float() - wanted).abs() <= unit).all(), name
    assert len(parts) == 28
    config.consolidate.adapter_only = True
    consolidate.run(config)
    folder = tmp_path / "run/model"
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "muster.json",
    }
    assert (tmp_path / "run/model.1").exists()
    tokens = torch.arange(3, 40)[None]
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    apart = PeftModel.from_pretrained(whole, folder)(tokens).logits
    together = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model.1", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(apart, together, rtol=0.05, atol=0.05)
    assert not torch.allclose(
        apart, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(tokens).logits, atol=0.1
    )


@pytest.mark.parametrize("words", [[], ["adapter=lora"]], ids=["whole", "lora"])
def test_tensors_that_training_does_not_use_stay_as_they_are(words, run, base, tmp_path, capsys) -> None:
    shutil.copytree(base, tmp_path / "more")
    more = {
        "mtp.layer.weight": torch.randn(3, 5),
        "model.layers.99.eh_proj.weight": torch.ones(4, dtype=torch.bfloat16),
    }
    save_file(load_file(base / "model.safetensors") | more, tmp_path / "more/model.safetensors", {"format": "pt"})
    ignored = r'model.ignore_tensors=["^mtp[.]","[.]99[.]"]'
    config, _ = run("model=hub", f"model.source={tmp_path / 'more'}", "train.precision=bf16", ignored, *words)
    found = merged(config, tmp_path)
    assert f"2 tensors that training does not use stay as they are in {tmp_path / 'more'}" in capsys.readouterr().out
    assert found.keys() == load_file(base / "model.safetensors").keys() | more.keys()
    for name, value in more.items():
        assert found[name].dtype is value.dtype and torch.equal(found[name], value)


def test_original_and_damage(run, base, tmp_path) -> None:
    config, live = run("model=hub", f"model.source={base}", "consolidate.dtype=original")
    assert {value.dtype for value in merged(config, tmp_path).values()} == {torch.bfloat16}
    path = tmp_path / "run/checkpoints/step-00000001"
    prints = read_json(path / "fingerprint.json")
    shutil.rmtree(tmp_path / "run/model")
    write_json(path / "fingerprint.json", prints | {"model.norm.weight": "0" * 64})
    with pytest.raises(RunError, match=r"weight model\.norm\.weight differs from that in training"):
        consolidate.run(config)
    write_json(path / "fingerprint.json", prints | {"another.weight": "0" * 64})
    with pytest.raises(RunError, match=r"lacks 1 of \d+ weights"):
        consolidate.run(config)
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/.model.partial").exists()


@pytest.mark.parametrize("words", [[], ["adapter=lora"]], ids=["whole", "lora"])
def test_a_model_that_cannot_be_streamed_is_merged_in_memory(words, run, base, tmp_path, capsys, monkeypatch) -> None:
    def refuse(_):
        raise saved_names.CannotStream("turned")

    config, _ = run("model=hub", f"model.source={base}", "train.precision=fp32", *words)
    streamed = merged(config, tmp_path)
    shutil.rmtree(tmp_path / "run/model")
    monkeypatch.setattr(weight_names, "blueprint_of_model", refuse)
    found = merged(config, tmp_path)
    assert "cannot be streamed (turned): it is merged in memory" in capsys.readouterr().out
    assert found.keys() == streamed.keys()
    for name, value in streamed.items():
        torch.testing.assert_close(found[name], value)
    consolidate.run(config)
    assert "model is there already" in capsys.readouterr().out


def test_a_run_without_a_checkpoint(compose, tmp_path) -> None:
    with pytest.raises(RunError, match="has no whole checkpoint"):
        consolidate.run(compose(f"run_dir={tmp_path}/run"))


def test_only_what_is_read_is_checked(run, tmp_path, monkeypatch) -> None:
    """Without fingerprints: a flipped bit in the moments does not matter, one in the weights is an error."""
    config, live = run()
    path = tmp_path / "run/checkpoints/step-00000001"
    (path / "fingerprint.json").unlink()
    monkeypatch.setattr(manifest, "PIECE", 4096)
    manifest.write(path, manifest.flush_and_describe(path, 0) | manifest.flush_and_describe(path, 1))
    checked = []
    monkeypatch.setattr(
        manifest.PieceChecker,
        "check",
        lambda *args, real=manifest.PieceChecker.check: checked.append(args[1:]) or real(*args),
    )
    found = merged(config, tmp_path)
    assert all(torch.equal(found[name], value) for name, value in live.items())
    read = {
        (file, piece)
        for file, offset, count in checked
        for piece in range(offset // 4096, (offset + count - 1) // 4096 + 1)
    }
    files = {extent.path for stored in open_checkpoint(path).tensors.values() for extent in stored.extents}
    every = {(file, piece) for file in files for piece in range(Path(file).stat().st_size // 4096)}
    assert len(every - read) > len(every) / 2  # two thirds of the bytes are moments
    shutil.rmtree(tmp_path / "run/model")
    spare = sorted(every - read)
    flip(*spare[len(spare) * 3 // 4])
    merged(config, tmp_path)
    shutil.rmtree(tmp_path / "run/model")
    flip(*sorted(read)[len(read) // 2])
    with pytest.raises(RunError, match=r"has a wrong checksum in bytes \d+ to \d+: copy the file again"):
        merged(config, tmp_path)
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/.model.partial").exists()


def flip(path, piece) -> None:
    with Path(path).open("r+b") as file:
        file.seek(piece * 4096 + 2000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
