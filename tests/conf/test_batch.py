"""conf/batch.py and conf/deepspeed.py: how a global batch is split, and that the DeepSpeed config says the same."""

import pytest

from conf import deepspeed
from conf.batch import split
from conf.choices import Precision
from tests.conftest import Compose, put


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "expected"),
    [
        (64, 1, 32, (1, 2)),
        (64, 16, 2, (16, 2)),
        (64, 16, 32, (2, 1)),
        (64, 5, 4, (4, 4)),
        (42, 5, 2, (3, 7)),
        (14, 5, 2, (1, 7)),
        (32, 99, 32, (1, 1)),
    ],
)
def test_the_micro_batch_is_the_largest_that_divides_a_ranks_rows(
    compose: Compose, global_batch: int, micro_batch: int, world_size: int, expected: tuple[int, int]
) -> None:
    config = put(compose(), {"train.global_batch": global_batch, "train.micro_batch": micro_batch})
    assert split(config, world_size) == expected
    assert expected[0] * expected[1] * world_size == global_batch


@pytest.mark.parametrize(
    "words", [["parallel=zero1"], ["parallel=zero2"], ["parallel=zero3"], ["parallel=zero3_offload"]]
)
def test_the_deepspeed_config_matches_the_training_loop(compose: Compose, words: list[str]) -> None:
    config = compose("cluster=slurm", "model=llama8b", "train.micro_batch=3", "train.global_batch=192", *words)
    settings = deepspeed.deepspeed_config(config, 32)
    micro, accumulated = settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
    assert (micro, accumulated) == split(config, 32)
    assert settings["train_batch_size"] == micro * accumulated * 32
    assert settings["zero_optimization"]["stage"] == config.parallel.zero_stage
    assert ("offload_param" in settings["zero_optimization"]) is config.parallel.offload_parameters
    assert ("offload_optimizer" in settings["zero_optimization"]) is config.parallel.offload_optimizer


@pytest.mark.parametrize(("precision", "enabled"), [(Precision.bf16, True), (Precision.fp32, False)])
def test_deepspeed_computes_in_the_precision_of_training(compose: Compose, precision: Precision, enabled: bool) -> None:
    settings = deepspeed.deepspeed_config(put(compose("parallel=zero3"), {"train.precision": precision}), 2)
    assert settings["bf16"]["enabled"] is enabled


@pytest.mark.parametrize("context_ranks", [1, 2, 4])
def test_the_exported_deepspeed_config_counts_each_row_once(compose: Compose, context_ranks: int) -> None:
    words = ["cluster=slurm", "model=llama8b", "parallel=zero3", "train.micro_batch=3", "train.global_batch=192"]
    config = put(compose(*words), {"parallel.context_ranks": context_ranks})
    settings = deepspeed.exported_config(config, 32)
    assert settings["train_batch_size"] == 192
    groups = 32 // context_ranks
    per_group = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    assert per_group * groups == 192


def test_a_program_of_the_user_has_a_batch_of_its_own(compose: Compose) -> None:
    config = put(compose("cluster=slurm", "parallel=zero3", "pipeline=custom"), {"custom.command": "python a.py"})
    settings = deepspeed.exported_config(config, 32)
    assert settings["train_batch_size"] == settings["train_micro_batch_size_per_gpu"] == "auto"
    assert settings["zero_optimization"]["stage"] == 3
