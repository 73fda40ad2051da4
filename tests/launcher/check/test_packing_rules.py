"""Packed rows of models that mix samples are refused before a job is queued, where config.json or the architecture says so.

tests/jobs/training/test_packing_probe.py compares the table with the trial of a tiny model.
"""

from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config
from launcher.check.packing_rules import LEAKING, problems
from tests.conftest import Compose, Launch
from tests.launcher.check.test_model_rules import LLAMA, folder

PACKED = "data.packing=true"
KERNELS = frozenset({"fla", "causal_conv1d", "mamba_ssm"})


def found(config: Config, fields: dict[str, Any] | None, kernels: frozenset[str] | None = frozenset()) -> list[str]:
    """What is said of a model with these fields of config.json, where jobs can import `kernels`."""
    from launcher.check.model_files import ModelFiles

    files = ModelFiles(True, (), LLAMA | fields) if fields is not None else None
    return [str(problem) for problem in problems(config, files, kernels)]


def on_cpus(compose: Compose, *words: str) -> Config:
    return compose("cluster=local", "model=hub", "model.source=unknown/unknown", *words)


def on_gpus(compose: Compose, *words: str) -> Config:
    return compose("cluster=slurm", "model=hub", "model.source=unknown/unknown", *words)


@pytest.mark.parametrize("family", [family for family in LEAKING if family != "falcon"])
def test_a_family_that_mixes_samples_is_refused(compose: Compose, family: str) -> None:
    [message] = found(on_cpus(compose, PACKED), {"model_type": family})
    assert message.startswith(f"data.packing=true: {family} does not keep the samples of a row apart")
    assert message.endswith(f"Set data.packing=false to train {family}")
    assert found(on_cpus(compose, "data.packing=false"), {"model_type": family}) == []


def test_the_family_is_that_of_the_text(compose: Compose) -> None:
    fields = {"model_type": "qwen3_5", "vision_config": {}, "text_config": {"model_type": "qwen3_5_text"}}
    [message] = found(on_cpus(compose, PACKED), fields)
    assert "qwen3_5_text does not keep" in message


def test_the_architecture_of_random_weights_is_read(compose: Compose) -> None:
    [message] = found(compose("cluster=local", "model=tiny", "model.architecture.model_type=mamba2", PACKED), None)
    assert "mamba2 does not keep" in message


FINE: list[dict[str, Any]] = [
    {},
    {"model_type": "falcon", "alibi": False},
    {"model_type": "granitemoehybrid", "layer_types": ["attention", "attention"]},
    {"model_type": "lfm2", "layer_types": ["full_attention", "full_attention"]},
    {"model_type": "a_family_of_its_own"},
]


@pytest.mark.parametrize("fields", FINE, ids=lambda fields: fields.get("model_type", "llama"))
def test_what_keeps_samples_apart_is_packed(compose: Compose, fields: dict[str, Any]) -> None:
    assert found(on_cpus(compose, PACKED), fields) == []


MIXING: list[dict[str, Any]] = [
    {"model_type": "falcon", "alibi": True},
    {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
    {"model_type": "granitemoehybrid"},
    {"model_type": "nemotron_h", "layers_block_type": ["mamba", "attention"]},
]


@pytest.mark.parametrize("fields", MIXING, ids=lambda fields: fields["model_type"])
def test_kinds_of_layers_that_mix_samples_are_refused(compose: Compose, fields: dict[str, Any]) -> None:
    assert len(found(on_cpus(compose, PACKED), fields)) == 1


def test_where_kernels_may_keep_samples_apart_the_probe_decides(compose: Compose) -> None:
    hybrid, recurrent = {"model_type": "qwen3_next"}, {"model_type": "rwkv"}
    assert found(on_gpus(compose, PACKED), hybrid, KERNELS) == []
    assert found(on_gpus(compose, PACKED), hybrid, None) == []  # jobs use another Python
    [message] = found(on_gpus(compose, PACKED), hybrid, frozenset({"fla"}))
    assert "without the kernels of causal_conv1d and fla, so they would" in message
    assert len(found(on_cpus(compose, PACKED), hybrid, KERNELS)) == 1
    assert len(found(on_gpus(compose, PACKED), recurrent, KERNELS)) == 1


def test_only_jobs_that_pack_are_refused(compose: Compose) -> None:
    fields = {"model_type": "rwkv"}
    assert found(on_cpus(compose, PACKED, "pipeline=evaluate"), fields) == []
    assert len(found(on_cpus(compose, PACKED, "pipeline=preflight"), fields)) == 1


def test_ranks_that_share_a_row_make_no_mask(compose: Compose) -> None:
    fields, words = {"model_type": "gpt_oss"}, (PACKED, "parallel.context_ranks=2")
    [message] = found(on_gpus(compose, *words), fields)
    assert message.endswith("Set data.packing=false, or parallel.context_ranks=1")
    assert found(on_gpus(compose, PACKED), fields) == []
    assert found(on_gpus(compose, "parallel.context_ranks=2"), fields) == []


def test_a_launch_is_refused_before_anything_is_queued(launch: Launch, tmp_path: Path) -> None:
    source = folder(tmp_path / "m", {"model_type": "bloom"}, tokens=64)
    words = ("model=hub", f"model.source={source}", "data=sample", f"run_dir={tmp_path / 'run'}")
    done = launch(*words, PACKED)
    assert done.returncode == 2
    assert "data.packing=true: bloom does not keep the samples of a row apart" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
    assert "data.packing" not in (done := launch(*words, "dry_run=true")).stdout + done.stderr
