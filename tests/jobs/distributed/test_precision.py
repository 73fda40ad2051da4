"""jobs/distributed/precision.py: `train.precision=auto` looks at the GPUs, and what a GPU lacks is refused."""

from pathlib import Path

import pytest
import torch

from conf import precision as of_run
from conf.choices import Precision
from conf.errors import RunError, SiteError
from conf.schema import Config
from jobs.distributed import precision
from jobs.distributed.precision import Device
from jobs.distributed.process_group import World, process_group
from tests.conftest import Compose, put
from tests.jobs.ranks import spawn

CPU = Device("node1")
V100, T4 = Device("node1", "Tesla V100-SXM2-32GB", (7, 0)), Device("node2", "Tesla T4", (7, 5))
A100, H200 = Device("node3", "NVIDIA A100", (8, 0)), Device("node4", "NVIDIA H200", (9, 0))
M40, MI300 = Device("node5", "Tesla M40", (5, 2)), Device("node6", "AMD Instinct MI300X")
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([CPU, CPU], Precision.fp32),
        ([A100, H200], Precision.bf16),
        ([MI300], Precision.bf16),
        ([V100], Precision.fp16),
        ([T4, H200], Precision.fp16),
        ([M40, V100], Precision.fp32),
    ],
)
def test_auto_is_what_all_gpus_have(devices: list[Device], expected: Precision) -> None:
    assert precision.choose(devices) is expected


@pytest.mark.parametrize(
    ("values", "devices", "key", "remedy"),
    [
        ({"train.precision": Precision.bf16}, [H200, V100], "train.precision=bf16: Tesla V100", "train.precision=fp16"),
        ({"train.precision": Precision.bf16}, [M40], "train.precision=bf16: Tesla M40", "train.precision=fp32"),
        ({"train.precision": Precision.fp16}, [M40], "train.precision=fp16: Tesla M40", "train.precision=fp32"),
        (
            {"train.tf32": True, "train.precision": Precision.fp16},
            [T4],
            "train.tf32=true: Tesla T4",
            "train.tf32=false",
        ),
    ],
)
def test_what_a_gpu_lacks_is_refused_with_a_value_that_it_has(
    compose: Compose, values: dict[str, object], devices: list[Device], key: str, remedy: str
) -> None:
    config = put(compose(), values)
    [problem] = precision.lacking(config, devices)
    assert str(problem).startswith(key) and remedy in str(problem) and "node4" not in str(problem)
    name, _, value = remedy.partition("=")
    mended = put(config, {name: False if value == "false" else Precision[value]})
    assert precision.lacking(mended, devices) == []


def _settle(rank: int, config: Config, devices: list[Device]) -> None:
    precision.this_device = lambda _: devices[rank]
    with process_group(config) as world:
        precision.settle(config, world)
        assert config.train.precision is Precision.fp16


def test_ranks_agree_and_the_run_keeps_it(compose: Compose, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = put(compose(f"run_dir={tmp_path}"), {"train.precision": Precision.auto})
    with pytest.raises(RunError, match="precision.json is missing"):
        of_run.settled(config)
    spawn(_settle, 2, config, [H200, V100])
    assert of_run.settled(config) is Precision.fp16
    spawn(_settle, 2, config, [H200, H200])  # resumed on other GPUs


def test_a_run_in_bf16_does_not_resume_on_gpus_without_it(compose: Compose, tmp_path: Path, monkeypatch) -> None:
    config = put(compose(f"run_dir={tmp_path}"), {"train.precision": Precision.auto})
    monkeypatch.setattr(precision, "this_device", lambda _: H200)
    precision.settle(config, ALONE)
    config.train.precision = Precision.auto
    monkeypatch.setattr(precision, "this_device", lambda _: V100)
    with pytest.raises(
        SiteError, match=r"train.precision=bf16: Tesla V100.* on node1\) has no bf16: use GPUs of capability 8.0"
    ):
        precision.settle(config, ALONE)


@pytest.mark.parametrize("asked", [True, False])
def test_tf32_is_set_only_if_asked_for(compose: Compose, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    try:
        precision.settle(put(compose(), {"train.tf32": asked}), ALONE)
        assert torch.get_float32_matmul_precision() == ("high" if asked else before)
    finally:
        torch.set_float32_matmul_precision(before)
