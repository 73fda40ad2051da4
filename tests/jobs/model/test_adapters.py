"""Adapters, quantized bases and optimizers: loss curves of each layout against plain torch in one process, and stored numbers."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from conf.choices import Backend, Frozen
from conf.errors import ConfigError
from conf.schema import Config
from jobs import backends
from jobs.consolidation.lora import Nf4Rounder
from jobs.distributed.process_group import process_group
from jobs.model import build, quantized_linear
from jobs.tensor_io.slices import TensorPart
from jobs.tokenization.tokenizer import load_tokenizer
from tests.conftest import Compose
from tests.jobs import curves, ranks, reference
from tests.jobs.ranks import spawn

FSDP: dict[str, dict[str, object]] = {
    "fsdp": {},
    "hsdp": {"parallel.shard_ranks": 2},
    "ddp": {"parallel.shard_ranks": 1, "parallel.reshard_after_forward": False},
}
KINDS = ("dora", "rslora", "qlora", "qlora8", "lora_float8")
HIGH = "train.learning_rate=1e-2"
pytestmark = pytest.mark.filterwarnings("ignore")


def zero(stage: int) -> dict[str, object]:
    return {"parallel.backend": Backend.zero, "parallel.zero_stage": stage, "parallel.name": f"zero{stage}"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN of a small trained model, with its rows."""
    run = tmp_path_factory.mktemp("base") / "run"
    ranks.run(f"run_dir={run}", *curves.SMALL, "train.steps=12", "jobs=[preprocess,train,consolidate]")
    return run


@pytest.fixture(scope="module")
def untrained(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/model of the same shape with random weights, made in a second."""
    run, config = tmp_path_factory.mktemp("untrained"), compose("model=tiny")
    build.build(config).save_pretrained(run / "model")
    load_tokenizer(config).save_pretrained(run / "model")
    return run


def on(base: Path, compose: Compose, *words: str) -> Config:
    return compose("model=hub", f"model.source={base}/model", *curves.SMALL, *words)


def check_against_reference(configs: dict[str, list[Config]], base: Path) -> None:
    """Train every config; each loss must be within 2e-3 of the reference."""
    trained = curves.train_each([config for group in configs.values() for config in group])
    for name, group in configs.items():
        expected = [loss for loss, _ in reference.curve(group[0], base, 6)]
        for config in group:
            actual = curves.losses(trained.pop(0))
            assert actual == pytest.approx(expected, rel=2e-3), (name, config.run_dir)


@pytest.mark.proof
@pytest.mark.slow
def test_every_adapter_equals_the_reference_under_fsdp(base, compose: Compose, tmp_path: Path) -> None:
    check_against_reference(
        {
            kind: curves.runs(on(base, compose, f"adapter={kind}", HIGH), base / "data", tmp_path / kind, FSDP)
            for kind in KINDS
        },
        base,
    )


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("qlora", 1),
        ("qlora", 2),
        ("qlora", 3),
        ("qlora8", 3),
        ("lora_float8", 2),
        ("lora_float8", 3),
        ("dora", 1),
        ("dora", 2),
        ("rslora", 3),
    ],
)
def test_every_adapter_equals_the_reference_under_zero(kind, stage, base, compose: Compose, tmp_path: Path) -> None:
    config = on(base, compose, f"adapter={kind}", HIGH)
    check_against_reference({kind: curves.runs(config, base / "data", tmp_path, {"zero": zero(stage)})}, base)


@pytest.mark.proof
@pytest.mark.slow
def test_every_optimizer_equals_torchs_under_fsdp(base, compose: Compose, tmp_path: Path) -> None:
    check_against_reference(
        {
            kind: curves.runs(on(base, compose, f"train.optimizer={kind}", HIGH), base / "data", tmp_path / kind, FSDP)
            for kind in ("adafactor", "muon")
        },
        base,
    )


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bitsandbytes_optimizer_stays_near_plain_training_under_zero(
    stage, base, compose: Compose, tmp_path: Path
) -> None:
    """Not equal, because ZeRO's shards do not begin at blocks of 256 states, so that other states share a scale."""
    config = on(base, compose, "train.optimizer=adamw_8bit")
    [result] = curves.train_each(curves.runs(config, base / "data", tmp_path, {"zero": zero(stage)}))
    expected = [loss for loss, _ in reference.curve(config, base, 6)]
    assert curves.losses(result) == pytest.approx(expected, rel=5e-3)


def linear(rows: int = 48, columns: int = 128) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=True)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def packed(source: nn.Linear, kind: Frozen, dtype: torch.dtype, cuts: list[int]) -> quantized_linear.QuantizedLinear:
    """A quantized layer, filled part by part as several ranks would: each holds the packed numbers between two cuts."""
    layer = quantized_linear.QuantizedLinear(source, kind, dtype)
    numbers = torch.empty(layer.weight.shape, dtype=dtype)
    original = source.weight.detach().to(dtype).flatten()
    absmaxes = []

    def read(part: TensorPart) -> int:
        part.destination.copy_(original[part.begin : part.begin + part.destination.numel()])
        return part.destination.nbytes

    edges = [0, *cuts, numbers.numel()]
    for begin, end in zip(edges, edges[1:], strict=False):
        layer.load(TensorPart((numbers.numel(),), begin, numbers[begin:end], trained=False), read)
        absmaxes.append(layer._local_absmax)
    blocks = torch.zeros(source.weight.numel() // layer.block)
    for first, absmax in absmaxes:
        blocks[first : first + absmax.numel()] = torch.maximum(blocks[first : first + absmax.numel()], absmax)
    layer._local_absmax = (0, blocks)
    layer.share_scales(torch.device("cpu"))
    layer.weight = nn.Parameter(numbers, requires_grad=False)
    return layer


@pytest.mark.parametrize("cuts", [[], [100, 101, 500]], ids=["whole", "cut inside blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_has_the_numbers_of_bitsandbytes(dtype, cuts) -> None:
    from bitsandbytes import functional as theirs

    source = linear()
    layer = packed(source, Frozen.nf4, dtype, cuts)
    numbers, state = theirs.quantize_4bit(source.weight.detach().to(dtype), quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.weight.view(torch.uint8), numbers.flatten())
    whole = quantized_linear.dequantize(layer.weight, True, (48, 128), dtype, *layer.scales())
    assert torch.equal(whole, theirs.dequantize_4bit(numbers, state))


def test_rows_need_not_be_whole_blocks() -> None:
    """bitsandbytes 0.50.2 on CPUs applies wrong scales to such weights."""
    source = linear(columns=96)
    layer = packed(source, Frozen.nf4, torch.float32, [])
    dequantized = quantized_linear.dequantize(layer.weight, True, (48, 96), torch.float32, *layer.scales())
    off = (dequantized - source.weight).abs().view(-1, quantized_linear.BLOCK).amax(dim=1)
    assert (
        off <= 0.16 * source.weight.abs().view(-1, quantized_linear.BLOCK).amax(dim=1)
    ).all()  # half the widest step of NF4


def test_int8_has_the_numbers_of_bitsandbytes() -> None:
    from bitsandbytes import functional as theirs

    source = linear()
    layer = packed(source, Frozen.int8, torch.bfloat16, [77, 1000])
    codes, absmax, _ = theirs.int8_vectorwise_quant(source.weight.detach().bfloat16().half())
    assert torch.equal(layer.weight.view(torch.int8).view(48, 128), codes)
    assert torch.equal(layer.absmax, absmax.float())


@pytest.mark.parametrize("kind", [Frozen.nf4, Frozen.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_is_its_dequantized_copy(kind, dtype) -> None:
    quantized = packed(linear(), kind, dtype, [])
    copy = deepcopy(linear()).to(dtype)
    copy.weight.data = quantized_linear.dequantize(
        quantized.weight, kind is Frozen.nf4, (48, 128), dtype, *quantized.scales()
    )
    quantized.bias = copy.bias
    outputs, gradients = [], []
    for layer in (quantized, copy):
        x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        outputs.append(layer(x))
        outputs[-1].float().square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients)


def in_e4m3(matrix: torch.Tensor) -> torch.Tensor:
    """Quantize each row to e4m3, its largest magnitude becoming the largest number, and dequantize it again."""
    scale = matrix.double().abs().amax(dim=1, keepdim=True) / 448
    return (matrix.double() / scale).float().to(torch.float8_e4m3fn).double() * scale


@pytest.mark.parametrize("cuts", [[], [100, 101, 500]], ids=["whole", "cut inside rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float8_layer_multiplies_in_8_bits(dtype, cuts) -> None:
    """Forward quantizes the tokens of the input, backward the tokens of the gradient."""
    source = linear()
    layer = packed(source, Frozen.float8, dtype, cuts)
    layer.bias = nn.Parameter(source.bias.detach().to(dtype))
    x, grad = torch.randn(3, 5, 128).to(dtype).requires_grad_(), torch.randn(3, 5, 48).to(dtype)
    out = layer(x)
    out.backward(grad)
    weight = source.weight.detach().to(dtype)
    scale = weight.double().abs().amax(dim=1) / 448
    kept = in_e4m3(weight)
    expected = in_e4m3(x.detach().view(15, 128)) @ kept.T + layer.bias.double()
    back = in_e4m3(grad.view(15, 48) * scale) @ (kept / scale[:, None])
    near = 1e-4 if dtype is torch.float32 else 1e-2
    for seen, by_hand, plain in (
        (out, expected, F.linear(x, weight, layer.bias)),
        (x.grad, back, grad @ weight),
    ):
        assert off(seen.view(15, -1), by_hand) < near
        assert off(seen, plain) < 0.05


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_tokens_of_zeros_are_zeros_in_8_bits() -> None:
    layer = packed(linear(), Frozen.float8, torch.bfloat16, [])
    layer.bias = None
    x = torch.zeros(2, 128, dtype=torch.bfloat16, requires_grad=True)
    layer(x).backward(torch.zeros(2, 48, dtype=torch.bfloat16))
    assert not layer(x).any() and not x.grad.any()


def test_float8_leaves_layers_of_unsupported_widths() -> None:
    block = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 24))
    quantized_linear.replace_linears([block], Frozen.float8, torch.bfloat16)
    assert [type(layer) for layer in block] == [quantized_linear.QuantizedLinear, nn.Linear]


def test_float8_on_a_gpu_without_such_products_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(ConfigError, match="adapter.base=float8: .*this one is NVIDIA A100: set adapter.base=int8"):
        quantized_linear.replace_linears([], Frozen.float8, torch.bfloat16, on_gpu=True)
    quantized_linear.replace_linears([], Frozen.float8, torch.bfloat16, on_gpu=False)


def _is_sharded(_rank: int, config: Config) -> None:
    with process_group(config) as world:
        engine = backends.import_backend(config).wrap(build.build_on_meta(config), config, world)
        layers = quantized_linear.quantized_layers(getattr(engine.module, "module", engine.module))
        assert len(layers) == 7 * 4
        for name, layer in layers.items():
            whole = quantized_linear.nbytes(layer.kind, layer.in_features * layer.out_features)
            part = layer.weight.to_local() if isinstance(layer.weight, DTensor) else layer.weight.ds_tensor
            assert part.nbytes == whole // world.size, name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", pytest.param("zero3", marks=pytest.mark.proof)])
def test_a_packed_base_is_really_sharded(layout, compose: Compose, untrained) -> None:
    config = on(
        untrained,
        compose,
        "adapter=qlora",
        f"parallel={layout}",
        "cluster.train.ranks_per_node=2",
        "train.precision=bf16",
    )
    spawn(_is_sharded, 2, config)


def test_dora_starts_as_its_base(untrained, compose: Compose) -> None:
    """The weights are filled after PEFT has made the magnitudes, so Muster computes these again."""
    tokens = torch.arange(3, 40)[None]
    for precision in ("fp32", "bf16"):
        overrides = (f"train.precision={precision}",)
        losses = []
        for adapter in ("lora", "dora"):
            model = build.build(on(untrained, compose, f"adapter={adapter}", *overrides)).eval()
            losses.append(model(input_ids=tokens, labels=tokens).loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_is_merged_dequantized_is_the_one_trained_on(dtype) -> None:
    source = linear()
    layer = packed(source, Frozen.nf4, dtype, [])
    flat, rounding = source.weight.detach().flatten(), Nf4Rounder(dtype)
    for begin in range(0, flat.numel(), 1024):
        rounding.collect_scales(flat[begin : begin + 1024])
    rounding.finish_scales()
    rounded = torch.cat([rounding.round(flat[begin : begin + 640], begin) for begin in range(0, flat.numel(), 640)])
    assert torch.equal(
        rounded.view(48, 128), quantized_linear.dequantize(layer.weight, True, (48, 128), dtype, *layer.scales())
    )


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "rslora", "qlora"])
def test_the_merged_model_has_the_loss_of_the_live_one(adapter, base, tmp_path: Path) -> None:
    """With qlora, the base is merged as it was in training (dequantized)."""
    merge = ["consolidate.base=dequantised"] if adapter == "qlora" else []
    overrides = ["model=hub", f"model.source={base}/model", *curves.SMALL, f"adapter={adapter}", HIGH, *merge]
    ranks.run(f"run_dir={tmp_path}/run", *overrides, "jobs=[preprocess,train,consolidate,evaluate]")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    live = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert abs(live[-1] - live[0]) > 0.02
    assert json.loads((tmp_path / "run/evaluate.json").read_text())["loss"] == pytest.approx(live[-1], abs=1e-4)
