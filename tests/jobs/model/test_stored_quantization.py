"""Models that are stored in fp8 or mxfp4: each rank dequantizes its slices, training and merging give what plain weights give."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from conf.errors import ConfigError, DataError
from conf.files import read_json
from conf.schema import Config
from jobs import consolidate, preprocess
from jobs.consolidation import external
from jobs.evaluation import load_model
from jobs.model import build
from jobs.tensor_io import dequantize, safetensors
from jobs.tensor_io.layout import Extent, StoredTensor
from jobs.tensor_io.reader import OpenFiles, Reader
from tests.conftest import Compose
from tests.jobs import curves, families, quantized_models, ranks
from tests.jobs.quantized_models import FP8

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = {
    "qwen3-fp8": ("qwen3", "fp8", (16, 16)),
    "qwen3-fp8-of-tensors": ("qwen3", "fp8", None),
    "qwen3-fp8-of-rows": ("qwen3", "channel", None),
    "qwen3-fp8-with-edges": ("qwen3", "fp8", (40, 48)),
    "deepseek_v3-fp8": ("deepseek_v3", "fp8", (8, 8)),
    "gpt_oss-mxfp4": ("gpt_oss", "mxfp4", None),
}
TRANSFORMERS = {
    "qwen3-fp8": FineGrainedFP8Config(dequantize=True),
    "qwen3-fp8-of-tensors": FineGrainedFP8Config(dequantize=True),
    "deepseek_v3-fp8": FineGrainedFP8Config(dequantize=True),
    "gpt_oss-mxfp4": Mxfp4Config(dequantize=True),
}
"""How transformers dequantizes them. It needs another package for those of rows, and takes other blocks at edges."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """`folders(kind)`: a folder with plain weights in fp32, and one with the same numbers quantized."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            family, *how = KINDS[kind]
            plain = tmp_path_factory.mktemp(kind) / "plain"
            families.make(plain, family)
            quantized = plain.with_name("quantized")
            meant = quantized_models.quantize(plain, quantized, *how)
            save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
            made[kind] = plain, quantized
        return made[kind]

    return of


def on(source: Path, compose: Compose, *words: str):
    return compose("model=hub", f"model.source={source}", *families.COMMON, *words)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_codes_mean(kind, folders, compose: Compose) -> None:
    plain, quantized = folders(kind)
    expected = build.build(on(plain, compose)).state_dict()
    actual = build.build(on(quantized, compose)).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_weights_are_those_of_transformers(kind, dtype, folders, compose: Compose) -> None:
    _, quantized = folders(kind)
    actual = build.build(on(quantized, compose)).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(quantized, dtype=dtype, quantization_config=TRANSFORMERS[kind])
    assert all(torch.equal(actual[name].to(dtype), value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("rows", [256, 200, 576])
def test_blocks_at_the_edges_are_smaller(rows) -> None:
    """As in DeepSeek's own weight_dequant: the last block is cut. transformers makes other blocks of 200 rows, and refuses 576."""
    grid = torch.rand(-(-rows // 128), 2)
    codes = torch.randn(rows, 256).to(FP8)
    expected = codes.float() * grid.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    assert torch.equal(_read(codes, grid, (128, 128)), expected)
    op = Fp8Dequantize(None)
    if rows == 256:
        assert torch.equal(op._dequantize_one(codes, grid, torch.float32), expected)
    elif rows == 200:
        assert not torch.equal(op._dequantize_one(codes, grid, torch.float32), expected)
    else:
        with pytest.raises(ValueError, match="not divisible"):
            op._dequantize_one(codes, grid, torch.float32)


def _read(codes: torch.Tensor, grid: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    stored = {
        "w.weight": _stored(codes, "codes", dequantize.FP8),
        "w.weight_scale_inv": _stored(grid, "scales", dequantize.FP32),
    }
    found = dequantize.dequantized(stored, {"quant_method": "fp8", "weight_block_size": list(block)})["w.weight"]
    return _numbers(found, codes, grid)


def _numbers(found: StoredTensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """All numbers of a quantized tensor of which the files are these two tensors."""
    files = {
        "codes": codes.view(torch.uint8).reshape(-1).numpy(),
        "scales": scales.view(torch.uint8).reshape(-1).numpy(),
    }

    def fetch(path, offset, buffer):
        buffer[:] = files[path][offset : offset + buffer.size]

    return dequantize.Dequantizer(fetch).read(found.extents[0], 0, found.numel).view(found.shape)


def _stored(value: torch.Tensor, path: str, dtype) -> StoredTensor:
    return StoredTensor(tuple(value.shape), dtype, (Extent(path, 0, 0, value.numel()),))


@pytest.mark.parametrize("kind", ["qwen3-fp8-with-edges", "gpt_oss-mxfp4"])
def test_any_range_of_elements_can_be_read(kind, folders) -> None:
    plain, quantized = folders(kind)
    expected = load_file(plain / "model.safetensors")
    stored = dequantize.dequantized(
        safetensors.find_tensors(quantized), read_json(quantized / "config.json")["quantization_config"]
    )
    files, generator = OpenFiles(), torch.Generator().manual_seed(0)
    reader = Reader(files)
    names = [name for name, tensor in stored.items() if tensor.is_quantized]
    for number in range(60):
        name = names[number % len(names)]
        start, stop = sorted(torch.randint(0, stored[name].numel + 1, (2,), generator=generator).tolist())
        block = torch.empty(stop - start).numpy()
        reader.fill(stored[name], start, block.view("uint8"))
        assert torch.equal(torch.from_numpy(block), expected[name].reshape(-1)[start:stop])
    files.close()


def test_the_exponents_of_mxfp4_are_those_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).repeat(16).view(1, 256, 1, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1)
    uint8 = dequantize.TORCH["uint8"]
    stored = {"w_blocks": _stored(blocks, "codes", uint8), "w_scales": _stored(scales, "scales", uint8)}
    actual = _numbers(dequantize.dequantized(stored, {"quant_method": "mxfp4"})["w"], blocks, scales)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert torch.equal(actual.to(dtype), expected)


RUNS = {
    "lora": ["parallel=fsdp", "adapter=lora", "adapter.r=4"],
    "full": ["parallel=fsdp"],
    "zero3": ["parallel=zero3"],
    "qlora": ["parallel=zero2", "adapter=qlora", "adapter.r=4", "consolidate.dtype=bf16"],
    "adapter-only": ["parallel=ddp", "adapter=lora", "adapter.r=4", "consolidate.adapter_only=true"],
}
FEW = [("deepseek_v3-fp8", ("lora",)), ("gpt_oss-mxfp4", ("full",))]
MERGED = ("lora", "full", "zero3", "qlora")
ALL = [
    pytest.param("deepseek_v3-fp8", MERGED, marks=pytest.mark.proof),
    pytest.param("gpt_oss-mxfp4", tuple(RUNS), marks=pytest.mark.proof),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "names"), [*FEW, *ALL])
def test_training_and_merging_equal_those_on_plain_weights(kind, names, folders, compose: Compose, tmp_path) -> None:
    configs = []
    for name in names:
        for source in folders(kind):
            config = on(source, compose, *RUNS[name], "train.steps=2")
            config.run_dir = str(tmp_path / f"{name}-{source.name}")
            Path(config.run_dir).mkdir()
            if configs:
                (Path(config.run_dir) / "data").symlink_to(Path(configs[0].run_dir) / "data")
            else:
                preprocess.run(config)
            configs.append(config)
    ranks.spawn(curves.train_on_rank, 2, configs)
    for name, plain, quantized in zip(names, configs[::2], configs[1::2], strict=True):
        assert _losses(plain) == _losses(quantized), name
        expected, actual = _merged(plain), _merged(quantized)
        assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected), (
            name
        )
        config_json = read_json(Path(quantized.run_dir) / "model/config.json") or {}
        assert "quantization_config" not in config_json
    if names[-1] == "adapter-only":
        tokens = torch.arange(40, 60)[None]
        folders_of_adapter = [(Path(config.run_dir) / "model", config) for config in configs[-2:]]
        models = [load_model.load_folder(*item, torch.float32) for item in folders_of_adapter]
        assert torch.equal(*[model(input_ids=tokens).logits for model in models])


def _losses(config: Config) -> list[float]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def _merged(config: Config) -> dict[str, torch.Tensor]:
    consolidate.run(config)
    return load_file(next((Path(config.run_dir) / "model").glob("*model.safetensors")))


@pytest.mark.parametrize("kind", ["qwen3-fp8-with-edges", "gpt_oss-mxfp4"])
def test_a_folder_is_dequantized_without_training(kind, folders, tmp_path) -> None:
    plain, quantized = folders(kind)
    expected = load_file(plain / "model.safetensors")
    external.main([str(quantized), "--base", str(quantized), "--out", str(tmp_path / "out")])
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.to(torch.bfloat16)) for name, value in expected.items())
    _, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(problems.values())
    assert read_json(tmp_path / "out/muster.json")["verified"]
    assert read_json(tmp_path / "out/config.json")["dtype"] == "bfloat16"


def test_an_adapter_of_another_program_is_merged_into_the_dequantized_base(folders, tmp_path) -> None:
    """The merge compares its logits with those of PEFT's model."""
    plain, quantized = folders("qwen3-fp8-with-edges")
    torch.manual_seed(0)
    live = get_peft_model(
        AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32),
        LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False),
    )
    live.save_pretrained(tmp_path / "adapter")
    external.main(
        [str(tmp_path / "adapter"), "--base", str(quantized), "--out", str(tmp_path / "out"), "--dtype", "fp32"]
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, live.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


def test_codes_are_dequantized_once_their_config_is_copied(folders, tmp_path) -> None:
    """What the message says."""
    plain, quantized = folders("qwen3-fp8")
    shutil.copytree(quantized, tmp_path / "bare", ignore=shutil.ignore_patterns("config.json"))
    with pytest.raises(DataError, match=r"copy the config\.json beside it that says how it is quantized"):
        external.main([str(tmp_path / "bare"), "--out", str(tmp_path / "out")])
    shutil.copy(quantized / "config.json", tmp_path / "bare")
    external.main([str(tmp_path / "bare"), "--out", str(tmp_path / "out")])
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", plain))
    assert all(torch.equal(found[name], value.to(torch.bfloat16)) for name, value in expected.items())


def test_codes_without_scales_are_refused(folders, compose: Compose, tmp_path) -> None:
    _, quantized = folders("qwen3-fp8")
    broken = tmp_path / "broken"
    shutil.copytree(quantized, broken)
    (file,) = [
        path
        for path in broken.glob("*.safetensors")
        if "model.layers.0.mlp.up_proj.weight_scale_inv" in load_file(path)
    ]
    tensors = {name: value for name, value in load_file(file).items() if "layers.0.mlp.up_proj" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    weight = "model.layers.0.mlp.up_proj.weight"
    name = f"{weight} is stored in float8_e4m3fn, and {weight}_scale_inv is in none of the files"
    for read in (build.build, load_model.load_base):
        with pytest.raises(ConfigError, match=name):
            read(on(broken, compose))
    with pytest.raises(DataError, match=name):
        external.main([str(broken), "--base", str(broken), "--out", str(tmp_path / "out")])
    other = dict(tensors) | {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(3, 3)}
    save_file(other, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"has \[3, 3\] scales for \[96, 64\] numbers"):
        build.build(on(broken, compose))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_quantized_weights_are_refused_by_the_job(method, folders, compose: Compose, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders("qwen3-fp8")[1], broken)
    fields = json.loads((broken / "config.json").read_text()) | {
        "quantization_config": {"quant_method": method, "bits": 4}
    }
    (broken / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        ConfigError, match=rf"is stored quantized \({method}, 4 bits\): set model.source to the original model"
    ):
        build.build(on(broken, compose))
