"""The text of multimodal models is merged into the whole: its towers keep every bit, and the logits are those of training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from conf.files import read_json, write_json
from conf.resolve import digest
from jobs import backends, consolidate
from jobs.checkpoint import checkpointing
from jobs.distributed.process_group import process_group
from jobs.evaluation import load_model
from jobs.model import build
from tests.jobs import families
from tests.jobs.checkpoints import save
from tests.jobs.ranks import spawn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MULTIMODAL = [name for name, (_, values) in families.FAMILIES.items() if "text_config" in values]
QUICK = ["gemma3", "llama4", "qwen2_5_vl"]
"""A tied head; experts and a decoder with its head inside; a decoder that has no class of its own."""
TOKENS = torch.randint(3, 1000, (1, 24), generator=torch.Generator().manual_seed(0))


def train(rank, configs) -> None:
    """One step of each config, then a checkpoint with fingerprints; also saves the live weights and logits for the test."""
    torch.set_num_threads(1)
    with process_group(configs[0]) as world:
        for config in configs:
            backend = backends.import_backend(config)
            engine = backend.wrap(build.build_on_meta(config), config, world)
            logits = engine.module(input_ids=TOKENS, use_cache=False).logits
            backend.backward(engine, logits.float().log_softmax(-1)[..., 5].mean(), last=True)
            backend.step(engine, 1e-2)
            about = {"layout": config.parallel.name, "config": digest(config)}
            path = save(config, 1, world, lambda folder: backend.save(engine, folder), about)  # noqa: B023
            live = {name: value.clone() for name, value in backend.weights(engine)}
            engine.module.eval()
            with torch.no_grad():
                after = engine.module(input_ids=TOKENS, use_cache=False).logits.float()
            after = after.full_tensor() if hasattr(after, "full_tensor") else after
            if world.is_main:
                fingerprints = {name: checkpointing.fingerprint(value) for name, value in live.items()}
                write_json(path / "fingerprint.json", fingerprints)
                torch.save((live, after), path.parent / "live.pt")


@pytest.fixture
def runs(compose, tmp_path):
    """`runs(names, words)`: a base in bf16 and a trained run of each family."""

    def trained(names, *words):
        configs = {}
        for name in names:
            base = tmp_path / name
            families.make(base, name, dtype=torch.bfloat16)
            write_json(base / "preprocessor_config.json", {"image_mean": [0.5]})
            named = [f"model.source={base}", f"run_dir={tmp_path}/run-{name}"]
            configs[name] = compose("model=hub", *named, *families.COMMON, "train.global_batch=2", *words)
        spawn(train, 2, list(configs.values()))
        return configs

    return trained


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def check(config) -> None:
    """The folder of the merge: names of the base, towers bit for bit, logits of training, config and processor of the base."""
    base, folder = Path(config.model.source), Path(config.run_dir) / "model"
    live, logits = torch.load(folder.parent / "checkpoints/live.pt")
    before, after = tensors(base), tensors(folder)
    assert before.keys() == after.keys()
    towers = [name for name in before if "vis" in name or "projector" in name]
    assert towers
    for name, value in after.items():
        same = value.dtype == before[name].dtype and torch.equal(value, before[name])
        assert same == (name in towers), name
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    if config.adapter.kind.name == "none":
        state = whole.state_dict()
        for name, value in live.items():
            assert torch.equal(state[families.in_whole_model(name, whole)], value), name
    fields, made = read_json(base / "config.json"), read_json(folder / "config.json")
    assert {name for name in {*fields, *made} if fields.get(name) != made.get(name)} <= {"dtype", "text_config"}
    assert made["architectures"] == fields["architectures"] and made["dtype"] == "float32"
    assert read_json(folder / "preprocessor_config.json") == {"image_mean": [0.5]}
    assert type(load_model.load(config)).__name__ == fields["architectures"][0]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        pytest.param(["parallel=fsdp"], QUICK, id="full"),
        pytest.param(["parallel=fsdp", "adapter=lora", "adapter.r=4"], QUICK, id="LoRA"),
        *(pytest.param(["parallel=zero3"], [name], id=f"zero3 {name}", marks=pytest.mark.proof) for name in MULTIMODAL),
        *(
            pytest.param(["parallel=zero3", "adapter=lora"], [name], id=f"zero3 LoRA {name}", marks=pytest.mark.proof)
            for name in MULTIMODAL
        ),
    ],
)
def test_text_is_merged_into_the_whole_model(words, names, runs, capsys) -> None:
    for config in runs(names, *words).values():
        consolidate.run(config)
        check(config)


def test_an_adapter_alone_fits_the_whole_model(runs) -> None:
    (config,) = runs(
        ["qwen2_5_vl"], "parallel=fsdp", "adapter=lora", "adapter.r=4", "consolidate.adapter_only=true"
    ).values()
    consolidate.run(config)
    _, logits = torch.load(Path(config.run_dir) / "checkpoints/live.pt")
    with torch.no_grad():
        model = load_model.load_folder(Path(config.run_dir) / "model", config, torch.float32)
        torch.testing.assert_close(model(input_ids=TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    assert type(model.get_base_model()).__name__ == "Qwen2_5_VLForConditionalGeneration"
