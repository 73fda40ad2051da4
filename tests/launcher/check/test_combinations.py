"""launcher/check/combinations.py: options that do not work together are refused, with what to use instead."""

from typing import Any

import pytest

from conf.choices import Float8, Frozen, MergeBase, Optimizer, Precision, Verify
from launcher.check import rules
from launcher.check.observe import Facts
from tests.conftest import Compose, put

HERE = ("cluster=slurm", "model=llama8b")
BF16 = {"train.precision": Precision.bf16}


def messages(compose: Compose, words: tuple[str, ...], values: dict[str, Any]) -> list[str]:
    return [str(problem) for problem in rules.problems(put(compose(*HERE, *words), values), Facts())]


@pytest.mark.parametrize(
    ("words", "values", "key", "remedy"),
    [
        ((), {"adapter.dora": True}, "adapter.dora=true", "adapter=lora"),
        ((), {"adapter.rslora": True}, "adapter.rslora=true", "adapter=lora"),
        ((), {"adapter.base": Frozen.nf4}, "adapter.base=nf4", "adapter=lora"),
        (("adapter=dora", "parallel=zero3"), {}, "adapter.dora=true", "parallel=zero2"),
        (("adapter=dora",), {"adapter.base": Frozen.int8}, "adapter.dora=true", "adapter.base=int8"),
        ((), {"train.reentrant_checkpointing": True}, "train.reentrant_checkpointing=true", "train.activation_checkpointing=full"),
        ((), {"adapter.rank_pattern": {"q_proj": 4}}, "adapter.rank_pattern={'q_proj': 4}", "adapter=lora"),
        ((), {"adapter.layers_to_transform": [1]}, "adapter.layers_to_transform=[1]", "adapter=lora"),
        (("adapter=lora",), {"adapter.rank_pattern": {"q_proj": 0}}, "adapter.rank_pattern.q_proj=0", "at least 1"),
        (("adapter=lora",), {"adapter.alpha_pattern": {"(": 4.0}}, "adapter.alpha_pattern=(", "regular expression"),
        (("adapter=lora",), {"adapter.layers_to_transform": [32]}, "adapter.layers_to_transform=32", "0 to 31"),
        (("adapter=lora",), {"consolidate.base": MergeBase.dequantised}, "consolidate.base=dequantised", "base=original"),
        (("adapter=qlora8",), {"consolidate.base": MergeBase.dequantised}, "consolidate.base=dequantised", "base=original"),
        (("adapter=qlora",), {"consolidate.verify": Verify.logits}, "consolidate.verify=logits", "base=dequantised"),
        (("adapter=qlora8",), {"consolidate.verify": Verify.logits}, "consolidate.verify=logits", "consolidate.verify=weights"),
        (("parallel=zero2",), {"train.optimizer": Optimizer.muon}, "train.optimizer=muon", "parallel=fsdp"),
        (("parallel=zero1",), {"train.optimizer": Optimizer.adafactor}, "train.optimizer=adafactor", "parallel=fsdp"),
        ((), {"train.optimizer": Optimizer.paged_adamw_8bit}, "train.optimizer=paged_adamw_8bit", "torchao"),
        (("parallel=ddp",), {"train.optimizer": Optimizer.paged_adamw}, "train.optimizer=paged_adamw", "parallel=zero2"),
        (("parallel=zero3_offload",), {"train.optimizer": Optimizer.adamw_8bit}, "train.optimizer=adamw_8bit", "without offload"),
        (("parallel=fsdp_offload",), {"train.optimizer": Optimizer.muon}, "train.optimizer=muon", "without offload"),
        ((), {"train.optimizer": Optimizer.muon, "parallel.tensor_ranks": 2}, "train.optimizer=muon", "train.optimizer=adamw"),
        (("parallel=zero3",), BF16 | {"train.float8": Float8.tensorwise}, "train.float8=tensorwise", "parallel=fsdp"),
        ((), {"train.float8": Float8.rowwise, "train.precision": Precision.fp32}, "train.float8=rowwise", "train.precision=bf16"),
        (("adapter=lora",), BF16 | {"train.float8": Float8.rowwise}, "train.float8=rowwise", "adapter=lora_float8"),
        (("parallel=fsdp_offload",), BF16 | {"train.float8": Float8.rowwise}, "train.float8=rowwise", "parallel=fsdp"),
        ((), BF16 | {"train.float8": Float8.rowwise, "model.architecture.intermediate_size": 14340}, "train.float8=rowwise", "16"),
    ],
)  # fmt: skip
def test_options_that_do_not_work_together_are_refused_with_a_remedy(
    compose: Compose, words: tuple[str, ...], values: dict[str, Any], key: str, remedy: str
) -> None:
    [message] = messages(compose, words, values)
    assert message.startswith(f"{key}: "), message
    assert remedy in message


@pytest.mark.parametrize(
    ("words", "values", "key"),
    [
        (("adapter=qlora", "jobs=[train]"), {}, "adapter.base=nf4"),
        (("parallel=zero2",), {"train.optimizer": Optimizer.paged_adamw}, "train.optimizer=paged_adamw"),
        ((), BF16 | {"train.float8": Float8.tensorwise}, "train.float8=tensorwise"),
        (("parallel=zero2",), {"train.precision": Precision.fp16}, "train.precision=fp16"),
        ((), {"train.tf32": True}, "train.tf32=true"),
    ],
)
def test_options_that_need_a_gpu_are_refused_on_cpus(
    compose: Compose, words: tuple[str, ...], values: dict[str, Any], key: str
) -> None:
    config = put(compose("model=tiny", "cluster.train.gpus_per_node=0", *words), values)
    [message] = [str(problem) for problem in rules.problems(config, Facts())]
    assert message.startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("adapter=dora", "parallel=zero2"), {}),
        (("adapter=qlora", "parallel=zero3"), {"consolidate.base": MergeBase.dequantised}),
        (("parallel=zero3",), {"train.optimizer": Optimizer.paged_adamw_8bit}),
        (("parallel=hsdp",), {"train.optimizer": Optimizer.muon}),
        ((), BF16 | {"train.float8": Float8.tensorwise}),
        (("parallel=zero2",), {"train.precision": Precision.fp16}),
    ],
)
def test_options_that_work_together(compose: Compose, words: tuple[str, ...], values: dict[str, Any]) -> None:
    assert messages(compose, words, values) == []
