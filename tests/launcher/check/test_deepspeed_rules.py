"""launcher/check/deepspeed_rules.py: DeepSpeed's own settings are passed on, or refused with the key that decides them."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf import deepspeed, resolve
from conf.errors import ConfigError
from conf.resolve import flat
from launcher.check import resume, rules
from launcher.check.observe import Facts
from launcher.estimate import memory
from tests.conftest import Compose, put

HERE = (
    "cluster=slurm",
    "model=llama8b",
    "train.precision=bf16",
    "cluster.train.nodes=2",
    "cluster.train.ranks_per_node=8",
)
LIVE = "zero_optimization.stage3_max_live_parameters"


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def messages(compose: Compose, *words: str, key: str, value: Any) -> list[str]:
    config = put(compose(*HERE, *words), {"parallel.deepspeed": nested(key, value)})
    return [str(problem) for problem in rules.problems(config, Facts())]


def test_null_sets_nothing(compose: Compose) -> None:
    config = compose(*HERE)
    before = deepspeed.deepspeed_config(config, 16)
    assert messages(compose, key=LIVE, value=None) == messages(compose, key=LIVE, value="auto") == []
    assert deepspeed.deepspeed_config(put(config, {"parallel.deepspeed": nested(LIVE, None)}), 16) == before


def test_dotted_and_nested_keys_are_the_same(compose: Compose) -> None:
    config = compose(*HERE)
    dotted = put(compose(*HERE), {"parallel.deepspeed": {LIVE: 7}})
    config = put(config, {"parallel.deepspeed": nested(LIVE, 7)})
    assert deepspeed.zero_section(config)["stage3_max_live_parameters"] == 7
    assert deepspeed.zero_section(dotted) == deepspeed.zero_section(config)


@pytest.mark.parametrize(
    ("words", "key", "value", "remedy"),
    [
        ((), "zero_optimization.stage", 2, "Use parallel=zero2"),
        ((), "zero_optimization.stage", 0, "Use parallel=ddp"),
        ((), "zero_optimization.stage3_max_live_paramters", 1, f"Did you mean {LIVE}?"),
        ((), LIVE, "many", "must be a whole number"),
        ((), LIVE, 1.5, "must be a whole number"),
        ((), LIVE, float("inf"), "must be a whole number"),
        ((), LIVE, float("nan"), "must be a whole number"),
        (("train.precision=fp16",), "fp16.loss_scale", float("inf"), "must be a number"),
        ((), "zero_optimization.overlap_comm", "yes", "must be true or false"),
        ((), "zero_optimization.offload_param.device", "cpu", "Set parallel.offload_parameters=true"),
        ((), "zero_optimization.offload_optimizer.device", "nvme", "Use device: cpu"),
        ((), "zero_optimization.offload_optimizer.pin_memory", True, "needs parallel.offload_optimizer=true"),
        (("parallel=zero3_offload",), "zero_optimization.offload_optimizer.device", "none", "offload_optimizer=false"),
        ((), "zero_optimization.round_robin_gradients", True, "Remove it"),
        ((), "zero_optimization.zero_quantized_weights", True, "parallel=fsdp"),
        ((), "bf16.enabled", False, "train.precision=bf16 decides this"),
        ((), "fp16.enabled", True, "Set train.precision=fp16"),
        ((), "gradient_clipping", 0.5, "Set train.max_grad_norm=0.5"),
        ((), "train_batch_size", 128, "train.global_batch=64 make it 64"),
        ((), "train_micro_batch_size_per_gpu", 4, "Set train.micro_batch=4"),
        (("train.micro_batch=2",), "gradient_accumulation_steps", 4, "train.micro_batch=2 make it 2"),
        ((), "optimizer.type", "Lion", "train.optimizer=adamw"),
        ((), "optimizer.params.lr", 1e-3, "Set train.learning_rate=0.001"),
        ((), "optimizer.params.betas", 3, "is not a valid value"),
        ((), "scheduler.type", "WarmupDecayLR", "Set train.lr_schedule=linear"),
        ((), "activation_checkpointing.cpu_checkpointing", True, "Set train.activation_checkpointing"),
        ((), "zero_allow_untested_optimizer", False, "Muster sets it to true. Remove it"),
        ((), "data_types.grad_accum_dtype", "bf16", "Muster sets it to fp32. Remove it"),
        ((), "some_new_key", 1, "Remove it"),
        (("parallel.bucket_elements=1000",), "zero_optimization.reduce_bucket_size", 2000, "Set one of them"),
    ],
)  # fmt: skip
def test_a_setting_that_another_key_decides_is_refused_with_that_key(
    compose: Compose, words: tuple[str, ...], key: str, value: Any, remedy: str
) -> None:
    layout = () if any(word.startswith("parallel=") for word in words) else ("parallel=zero3",)
    [message] = messages(compose, *layout, *words, key=key, value=value)
    assert message.startswith(f"parallel.deepspeed.{key}=") and remedy in message, message


@pytest.mark.parametrize(
    ("key", "value"),
    [("zero_optimization.stage", 3), ("zero_optimization.stage", "auto"), ("bf16.enabled", True), ("fp16.enabled", False),
     ("gradient_clipping", 1), ("train_batch_size", 64), ("optimizer.type", "AdamW"), ("optimizer.params.betas", [0.9, 0.95]),
     ("zero_allow_untested_optimizer", True), ("zero_optimization.offload_param.device", "none"), (LIVE, 1e9)],
)  # fmt: skip
def test_a_setting_that_says_what_muster_says_is_accepted(compose: Compose, key: str, value: Any) -> None:
    assert messages(compose, "parallel=zero3", key=key, value=value) == []


def test_fsdp_has_no_settings_of_deepspeed(compose: Compose) -> None:
    [message] = messages(compose, "parallel=fsdp", key=LIVE, value=1)
    assert message.startswith("parallel.deepspeed: ") and "Use parallel=zero3" in message


def test_a_file_is_merged_below_the_command_line(compose: Compose, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": "auto", "sub_group_size": 5e8, "overlap_comm": False}}))
    config = compose(*HERE, "parallel=zero3", f"parallel.deepspeed_config={file}",
                     "++parallel.deepspeed.zero_optimization.sub_group_size=1e7")  # fmt: skip
    assert rules.problems(config, Facts()) == [] and config.parallel.deepspeed_config is None
    theirs, plain = (flat(deepspeed.deepspeed_config(each, 16)) for each in (config, compose(*HERE, "parallel=zero3")))
    changed = {key: value for key, value in theirs.items() if plain[key] != value}
    assert changed == {"zero_optimization.sub_group_size": 10_000_000, "zero_optimization.overlap_comm": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"a": 1, "a": 2}', "the key a twice"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(compose: Compose, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / f"{message}.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        compose("parallel=zero3", f'parallel.deepspeed_config="{file}"')


@pytest.mark.parametrize(
    ("key", "value", "part", "grows"),
    [(LIVE, 10**8, "gathered", False), ("zero_optimization.sub_group_size", 10**7, "gradients", False),
     ("zero_optimization.reduce_bucket_size", 10**9, "communication", True),
     ("zero_optimization.stage3_param_persistence_threshold", 10**9, "gathered", True)],
)  # fmt: skip
def test_the_estimate_counts_what_is_set(compose: Compose, key: str, value: int, part: str, grows: bool) -> None:
    plain = compose(*HERE, "parallel=zero3")
    tuned = put(compose(*HERE, "parallel=zero3"), {"parallel.deepspeed": nested(key, value)})
    before, after = (memory.estimate(config) for config in (plain, tuned))
    assert before and after
    assert (getattr(after.device, part) > getattr(before.device, part)) is grows
    assert getattr(after.device, part) != getattr(before.device, part)


def test_a_resumed_run_takes_the_content_of_a_new_file(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    resolve.save(compose(*HERE, "parallel=zero3"), tmp_path / "run" / "config.yaml")
    (tmp_path / "mine.json").write_text(json.dumps(nested(LIVE, 10**8)))
    words = [f"resume={tmp_path}/run", f"parallel.deepspeed_config={tmp_path}/mine.json"]
    resumed = resume.resumed_config(compose(*HERE, "parallel=zero3", *words), words)
    assert resumed.parallel.deepspeed == nested(LIVE, 10**8)
