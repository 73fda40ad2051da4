"""launcher/estimate/memory.py and table.py: totals compared with measured runs, and their format."""

from dataclasses import replace

import pytest

from conf.choices import Checkpointing
from conf.schema import Config
from launcher.estimate import table
from launcher.estimate.activations import Loss
from launcher.estimate.memory import Loop, estimate
from launcher.estimate.table import GIB
from tests.conftest import ROOT, Compose, put

PLAIN = Loop(Loss.plain)
FUSED = Loop(Loss.liger, fused_kernels=True)
COMPILED = Loop(Loss.liger, fused_kernels=True, compiled=True)
MEASURED = [
    ("fsdp", 1, "full", PLAIN, 37),
    ("fsdp", 1, "full", FUSED, 30),
    ("fsdp", 1, "selective", COMPILED, 41),
    ("fsdp", 1, "none", COMPILED, 61),
    ("fsdp", 2, "none", COMPILED, 96),
    ("zero3", 1, "full", replace(PLAIN, fused_optimizer=False), 44),
    ("zero3", 1, "none", replace(FUSED, fused_optimizer=False), 67),
    ("zero3", 2, "none", replace(FUSED, fused_optimizer=False), 102),
]
"""Peak GiB that torch had reserved (without the CUDA context) on 8 H200, Llama 3.1 8B, rows of 8192 tokens, bf16; November 2026.
The loops were written by hand, with the buckets and sharding of conf/parallel; ZeRO's reduced in bf16, Muster's in fp32;
its AdamW was unfused."""


def measured_run(compose: Compose, layout: str, micro_batch: int, checkpointing: str) -> Config:
    return put(
        compose("cluster=slurm", "model=llama8b", f"parallel={layout}"),
        {
            "cluster.train.nodes": 1,
            "data.max_length": 8192,
            "train.global_batch": 8 * micro_batch,
            "train.micro_batch": micro_batch,
            "train.activation_checkpointing": Checkpointing[checkpointing],
        },
    )


def test_an_unknown_family_is_not_estimated(compose: Compose) -> None:
    config = compose("cluster=slurm", "model=llama8b")
    assert config.model.architecture
    assert estimate(put(config, {"model.architecture.model_type": "mamba"})) is None
    assert estimate(put(config, {"model.architecture": None})) is None


@pytest.mark.parametrize(("layout", "micro_batch", "checkpointing", "loop", "measured"), MEASURED)
def test_estimates_agree_with_measured_runs(
    compose: Compose, layout: str, micro_batch: int, checkpointing: str, loop: Loop, measured: float
) -> None:
    size = estimate(measured_run(compose, layout, micro_batch, checkpointing), loop)
    assert size
    assert (size.device.total - size.device.context) / GIB == pytest.approx(measured, rel=0.1)


def test_the_table_in_the_docs_shows_the_estimates(compose: Compose) -> None:
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    for layout, micro_batch, checkpointing, loop, measured in MEASURED:
        size = estimate(measured_run(compose, layout, micro_batch, checkpointing), loop)
        assert size
        guess = (size.device.total - size.device.context) / GIB
        words = f"| {layout} | {micro_batch} | {checkpointing} | {loop.loss.name} |"
        assert f"{words} {guess:.1f} | {measured} | {guess / measured:.2f} |" in page


OURS = {
    "parallel=fsdp parallel.reshard_after_forward=false, 2 GPUs": (
        ["parallel=fsdp", "parallel.reshard_after_forward=false"], 2, 1, 8192, 98.7),
    "parallel=zero3, 2 GPUs": (["parallel=zero3"], 2, 1, 8192, 107.9),
    "parallel=fsdp, gathered twice, 2 GPUs": (["parallel=fsdp"], 2, 1, 8192, 85.2),
    "the same, train.float8=tensorwise": (["parallel=fsdp", "train.float8=tensorwise"], 2, 1, 8192, 79.3),
    "parallel=zero3 train.compile=false, selective, 2 GPUs": (
        ["parallel=zero3", "train.compile=false", "train.activation_checkpointing=selective"], 2, 1, 8192, 91.9),
    "parallel=ddp adapter=lora, 1 GPU": (["parallel=ddp", "adapter=lora"], 1, 4, 4096, 85.9),
    "parallel=ddp adapter=qlora, 1 GPU": (["parallel=ddp", "adapter=qlora", "model.init=pretrained"], 1, 4, 4096, 76.1),
    "parallel=ddp adapter=lora_float8, 1 GPU": (
        ["parallel=ddp", "adapter=lora_float8", "model.init=pretrained"], 1, 4, 4096, 79.9),
}  # fmt: skip
"""Overrides, GPUs, micro batch, tokens per row, and GiB reserved (without the CUDA context) by runs of launch.py on H200s
(docs/performance.md)."""


def test_our_own_runs_stay_below_their_estimates(compose: Compose) -> None:
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    for name, (words, gpus, rows, length, measured) in OURS.items():
        sizes = [f"cluster.train.ranks_per_node={gpus}", f"cluster.train.gpus_per_node={gpus}", "cluster.train.nodes=1"]
        batch = [f"train.micro_batch={rows}", f"train.global_batch={rows * gpus}", f"data.max_length={length}"]
        size = estimate(
            compose("cluster=slurm", "model=llama8b", "train.activation_checkpointing=none", *words, *sizes, *batch)
        )
        assert size
        guess = (size.device.total - size.device.context) / GIB
        assert measured < guess < 1.4 * measured
        assert f"| {name} | {guess:.1f} | {measured} | {guess / measured:.2f} |" in page, f"{name}: {guess:.1f}"


def device(compose: Compose, *words: str) -> table.Device:
    size = estimate(compose("cluster=slurm", "model=llama8b", *words))
    assert size
    return size.device


def test_a_layout_that_shards_more_needs_less(compose: Compose) -> None:
    for layouts in (("ddp", "hsdp", "fsdp", "fsdp_offload"), ("zero1", "zero2", "zero3", "zero3_offload")):
        totals = [device(compose, f"parallel={layout}").total for layout in layouts]
        assert totals == sorted(totals, reverse=True), layouts


def test_full_training_state_is_sixteen_bytes_per_parameter_over_the_shards(compose: Compose) -> None:
    size = device(compose, "parallel=fsdp", "cluster.train.nodes=1", "train.micro_batch=1")  # of 8 a step
    assert size.parameters + size.gradients + size.optimizer == 16 * 8_030_261_248 / 8


def test_gradients_reuse_memory_of_activations_unless_they_are_accumulated(compose: Compose) -> None:
    words = ["parallel=fsdp", "cluster.train.nodes=1", "train.activation_checkpointing=none", "data.max_length=8192"]
    whole = 4 * 8_030_261_248 / 8
    assert device(compose, *words, "train.global_batch=8").gradients == 0
    assert device(compose, *words, "train.global_batch=16").gradients == whole
    assert 0 < device(compose, *words, "train.global_batch=8", "data.max_length=512").gradients < whole


def test_an_adapter_leaves_the_base_without_gradients_and_moments(compose: Compose) -> None:
    size = device(compose, "parallel=ddp", "adapter=lora")
    assert size.parameters > 2 * 8_030_261_248
    assert size.gradients + size.optimizer < 0.04 * size.parameters


def test_offloaded_state_is_in_host_memory(compose: Compose) -> None:
    for layout in ("fsdp_offload", "zero3_offload"):
        size = estimate(compose("cluster=slurm", "model=llama8b", f"parallel={layout}", "cluster.train.nodes=1"))
        assert size
        assert size.device.parameters + size.device.gradients + size.device.optimizer == 0
        assert size.host.offload >= 16 * 8_030_261_248


def test_a_model_that_every_rank_loads_whole_counts_once_per_rank(compose: Compose) -> None:
    size = estimate(compose("cluster=slurm", "model=llama70b", "parallel=fsdp"), Loop(sliced_loading=False))
    assert size
    assert size.host.loading == 8 * 4 * 70_553_706_496
    assert size.device.total == 4 * 70_553_706_496 + size.device.context
    assert "(while loading)" in table.line(size)


def test_disk_holds_the_kept_checkpoints_the_next_one_and_the_merged_model(compose: Compose) -> None:
    size = estimate(compose("cluster=slurm", "model=llama8b", "parallel=fsdp", "train.keep_checkpoints=3"))
    assert size
    assert size.disk.checkpoint == 12 * 8_030_261_248
    assert size.disk.total == 4 * size.disk.checkpoint + 2 * 8_030_261_248


def test_the_estimate_is_formatted_as_a_line_and_as_a_table(compose: Compose) -> None:
    size = estimate(compose("cluster=slurm", "model=llama8b"))
    assert size
    line, rows = table.line(size, 139), table.table(size)
    assert line.startswith(f"{size.device.total / GIB:.1f} of 139 GiB per GPU (parameters 0.9, gathered 3.2,")
    assert "GiB of host memory per node, checkpoint 89.7 GiB on disk" in line
    assert f"{'GPU total':<22}{size.device.total / GIB:>10.1f} GiB" in rows
    assert len({len(row) for row in rows}) == 1


def test_on_a_cpu_everything_is_host_memory(compose: Compose) -> None:
    size = estimate(compose())
    assert size
    assert not size.on_gpu
    assert size.device.context == 0
    assert size.host.offload == 2 * size.device.total
    assert " per rank (" in table.line(size)
