"""launcher/check/rules.py: each rule names its key and says what to do."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from conf.choices import AdapterKind, Format, Submit
from conf.schema import Config
from launcher.check.first_row import FirstRow
from launcher.check.observe import Facts
from launcher.check.rules import problems
from tests.conftest import Compose, put

LOCAL, SLURM = ("cluster=local",), ("cluster=slurm", "model=llama8b")


def messages(config: Config, facts: Facts | None = None) -> list[str]:
    return [str(problem) for problem in problems(config, facts or Facts())]


@pytest.mark.parametrize("words", [LOCAL, SLURM], ids=["here", "on Slurm"])
def test_the_defaults_have_no_problem(compose: Compose, words: tuple[str, ...]) -> None:
    assert messages(compose(*words)) == []


@pytest.mark.parametrize(
    ("words", "values", "key", "remedy"),
    [
        (LOCAL, {"name": "a b/c"}, "name=a b/c", "letters, digits"),
        (LOCAL, {"name": ""}, "name=", "must not be empty"),
        (LOCAL, {"jobs": ["train", "trian"]}, "jobs=trian", "Choose from fetch, preflight, preprocess, train"),
        (LOCAL, {"jobs": []}, "jobs=[]", "pipeline=finetune"),
        ((*LOCAL, "data.packing=true", "model.attention=cudnn"), {}, "model.attention=cudnn", "Use model.attention=auto"),
        (LOCAL, {"train.steps": None, "train.epochs": None}, "train.steps=null", "train.epochs"),
        (LOCAL, {"train.steps": 10, "train.warmup_steps": 10}, "train.warmup_steps=10", "below train.steps=10"),
        (LOCAL, {"train.warmup_steps": 3, "train.warmup_ratio": 0.1}, "train.warmup_ratio=0.1", "train.warmup_steps=3"),
        (LOCAL, {"train.eval_every": 3, "train.evals_per_epoch": 2}, "train.evals_per_epoch=2", "train.eval_every=3"),
        (LOCAL, {"train.save_every": 0, "train.saves_per_epoch": 2}, "train.saves_per_epoch=2", "the other to null"),
        (LOCAL, {"train.lr_cycles": 5}, "train.lr_cycles=5", "Set train.lr_schedule=cosine_restarts"),
        (LOCAL, {"train.lr_power": 2.0}, "train.lr_power=2.0", "Set train.lr_schedule=polynomial"),
        (LOCAL, {"train.decay_ratio": 0.5}, "train.decay_ratio=0.5", "Set train.lr_schedule=wsd"),
        ((*LOCAL, "train.lr_schedule=constant"), {"train.warmup_steps": 5}, "train.warmup_steps=5", "constant_with_warmup"),
        (LOCAL, {"train.unfrozen": ["layers.(1"]}, "train.unfrozen=layers.(1", "no regular expression"),
        ((*SLURM, "adapter=lora"), {"train.unfrozen": ["norm"]}, "train.unfrozen=['norm']", "Use adapter=none"),
        (LOCAL, {"train.learning_rates": {"norm": -1.0}}, "train.learning_rates.norm=-1.0", "at least 0"),
        (LOCAL, {"adapter.lora_plus_ratio": 16.0}, "adapter.lora_plus_ratio=16.0", "Add adapter=lora"),
        ((*LOCAL, "data.order=length"), {"data.packing": True}, "data.order=length", "Use data.order=balanced"),
        ((*LOCAL, "parallel.context_ranks=2"), {"train.neftune_alpha": 5.0}, "train.neftune_alpha=5.0", "context_ranks=1"),
        (LOCAL, {"train.global_batch": 7}, "train.global_batch=7", "2 ranks of cluster.train. Use 6 or 8"),
        (LOCAL, {"train.global_batch": 1}, "train.global_batch=1", "Use 2"),
        (SLURM, {"train.global_batch": 40}, "train.global_batch=40", "32 ranks of cluster.train. Use 32 or 64"),
        ((*SLURM, "parallel=zero3"), {"parallel.zero_stage": 0}, "parallel.zero_stage=0", "1, 2 or 3"),
        ((*SLURM, "parallel=zero3"), {"parallel.zero_stage": 4}, "parallel.zero_stage=4", "1, 2 or 3"),
        ((*SLURM, "parallel=zero2"), {"parallel.offload_parameters": True}, "parallel.offload_parameters=true", "zero_stage=3"),
        ((*SLURM, "parallel=zero1"), {"parallel.shard_ranks": 8}, "parallel.shard_ranks=8", "FSDP only"),
        (SLURM, {"parallel.shard_ranks": 5}, "parallel.shard_ranks=5", "must divide the 32 ranks"),
        (SLURM, {"parallel.shard_ranks": 64}, "parallel.shard_ranks=64", "must divide the 32 ranks"),
        (SLURM, {"parallel.offload_optimizer": True}, "parallel.offload_optimizer=true", "parallel=fsdp_offload"),
        (SLURM, {"parallel.offload_parameters": True}, "parallel.offload_optimizer=false", "parallel=fsdp_offload"),
        (LOCAL, {"cluster.train.nodes": 2}, "cluster.train.nodes=2", "cluster=slurm"),
        (LOCAL, {"cluster.cpu.nodes": 2, "jobs": ["train"]}, "cluster.cpu.nodes=2", "cluster=slurm"),
        (LOCAL, {"cluster.train.gpus_per_node": 2}, "cluster.train.gpus_per_node=2", "gpus_per_node=0 to run on the CPU"),
        (LOCAL, {"cluster.inference.gpus_per_node": 1}, "cluster.inference.gpus_per_node=1", "this machine has 0"),
        (SLURM, {"cluster.cpu.gpus_per_node": None}, "cluster.cpu.gpus_per_node=null", "must be a number"),
        (SLURM, {"cluster.train.gpus_per_node": 4}, "cluster.train.ranks_per_node=8", "cluster.train.gpus_per_node=4"),
        (SLURM, {"cluster.inference.ranks_per_node": 2, "jobs": ["evaluate"]}, "cluster.inference.ranks_per_node=2", "evaluate"),
        (SLURM, {"cluster.inference.nodes": 2, "jobs": ["generate"]}, "cluster.inference.nodes=2", "generate"),
        (("model=tiny",), {"model.architecture": None}, "model.architecture", "model.init=random"),
        (("model=tiny",), {"adapter.kind": AdapterKind.lora}, "adapter.kind=lora", "model.init=pretrained"),
        (LOCAL, {"data.train_on": []}, "data.train_on=[]", "at least one of system, user, assistant, tool"),
        (("data=mix", "++data.sets.a.path=o/n"), {"data.subset": "s"}, "data.subset=s", "Set data.sets.a.subset"),
        (("data=mix", "++data.sets.a.path=o/n"), {"data.files": ["s"]}, "data.files=['s']", "Set data.sets.a.files"),
        (("data=mix", "++data.sets.a.path=o/n"), {"data.split": "[:9]"}, "data.split=[:9]", "Set data.sets.a.split"),
        (LOCAL, {"data.validation_split": "[:9]"}, "data.validation_split=[:9]", "data.validation_path"),
        (LOCAL, {"data.validation_fraction": 0.6}, "data.validation_fraction=0.6", "at most 0.5"),
        (LOCAL, {"submit": Submit.script}, "submit=script", "cluster=slurm"),
        (SLURM, {"cluster.train.time_min": 2}, "cluster.signal_s=120", "must be below cluster.train.time_min=2 (120 s)"),
        (SLURM, {"cluster.network.master_port": 65536}, "cluster.network.master_port=65536", "at most 65535"),
        ((*SLURM, "train.activation_checkpointing=none"), {"cluster.train.gpu_memory_gib": 17.5},
         "cluster.train.gpu_memory_gib=17.5", "Use cluster.train.nodes=8 ("),
        ((*SLURM, "parallel=ddp"), {"cluster.train.gpu_memory_gib": 79.0}, "cluster.train.gpu_memory_gib=79.0", "parallel=fsdp"),
        (SLURM, {"cluster.train.gpu_memory_gib": 5.0}, "cluster.train.gpu_memory_gib=5.0", "No other layout, batch size or number"),
        (SLURM, {"cluster.environment": {"HF_TOKEN": "hf_x"}}, "cluster.environment.HF_TOKEN=(hidden)", "secrets=[HF_TOKEN]"),
        (SLURM, {"cluster.environment": {"my_api_key": "x"}}, "cluster.environment.my_api_key=(hidden)", "secrets"),
        (SLURM, {"cluster.environment": {"DB_PASSWORD": "x"}}, "cluster.environment.DB_PASSWORD=(hidden)", "secrets"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_run_is_refused_with_a_remedy(
    compose: Compose, words: tuple[str, ...], values: dict[str, Any], key: str, remedy: str
) -> None:
    [message] = messages(put(compose(*words), values))
    assert message.startswith(f"{key}: "), message
    assert remedy in message


@pytest.mark.parametrize(
    ("words", "facts", "key", "remedy"),
    [
        (LOCAL, Facts(files_missing=(("data.path", "a.jsonl"),)), "data.path=a.jsonl", "no such file"),
        (LOCAL, Facts(files_missing=(("generate.prompts", "p"),)), "generate.prompts=p", "no such file"),
        (LOCAL, Facts(first_rows=(FirstRow("data.path", error="has no rows"),)), "data.path=", "has no rows"),
        (
            LOCAL,
            Facts(first_rows=(FirstRow("data.path", ("question", "reply")),)),
            "data.path=",
            "alpaca needs instruction",
        ),
        (LOCAL, Facts(run_dir_error="already exists"), "run_dir=", "already exists"),
        (LOCAL, Facts(secrets_missing=("HF_TOKEN",)), "cluster.secrets=HF_TOKEN", "Export it"),
        (SLURM, Facts(slurm_missing=("sbatch", "srun")), "cluster=slurm", "sbatch is not on PATH"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_site_that_lacks_something_is_refused_with_a_remedy(
    compose: Compose, words: tuple[str, ...], facts: Facts, key: str, remedy: str
) -> None:
    [message] = messages(compose(*words), facts)
    assert message.startswith(key), message
    assert remedy in message


@pytest.mark.parametrize(
    ("format", "columns", "fits"),
    [
        (Format.alpaca, "instruction output", True),
        (Format.alpaca, "id input output instruction", True),
        (Format.alpaca, "text", False),
        (Format.messages, "messages", True),
        (Format.messages, "instruction output", False),
        (Format.text, "text id", True),
        (Format.text, "messages", False),
        (Format.auto, "instruction output", True),
        (Format.auto, "messages", True),
        (Format.auto, "text", True),
        (Format.auto, "instruction", False),
    ],
)
def test_rows_must_have_the_columns_of_their_format(compose: Compose, format: Format, columns: str, fits: bool) -> None:
    config = put(compose(), {"data.format": format})
    assert (messages(config, Facts(first_rows=(FirstRow("data.path", tuple(columns.split())),))) == []) is fits


@pytest.mark.parametrize(
    ("words", "values", "facts"),
    [
        (SLURM, {"dry_run": True}, Facts(slurm_missing=("sbatch",), secrets_missing=("HF_TOKEN",))),
        (SLURM, {"submit": Submit.script}, Facts(slurm_missing=("sbatch",))),
        (LOCAL, {}, Facts(slurm_missing=("sbatch",))),
        (LOCAL, {"cluster.train.gpus_per_node": 2}, Facts(gpus=2)),
        (LOCAL, {"cluster.train.gpus_per_node": 2}, Facts(gpus=8)),
        (SLURM, {"cluster.cpu.ranks_per_node": 2, "jobs": ["train"]}, Facts()),
        (SLURM, {"cluster.environment": {"HF_TOKEN": ""}}, Facts()),
        (SLURM, {"cluster.container.image": "a.sqsh"}, Facts()),
        (("model=tiny",), {"adapter.kind": AdapterKind.lora, "jobs": ["train"]}, Facts()),
        (SLURM, {"parallel.shard_ranks": 32}, Facts()),
        (SLURM, {"train.global_batch": 32, "train.micro_batch": 7}, Facts()),
        (LOCAL, {"train.steps": 20, "train.epochs": 3.0}, Facts()),
        (SLURM, {"cluster.train.gpu_memory_gib": 79.0}, Facts()),
        (SLURM, {"cluster.train.gpu_memory_gib": 1.0, "jobs": ["preprocess"]}, Facts()),
        (SLURM, {"cluster.train.gpu_memory_gib": 1.0, "model.architecture": None}, Facts()),
        (LOCAL, {"cluster.train.gpu_memory_gib": 1.0}, Facts()),
    ],
    ids=[
        "look without Slurm and secrets",
        "write scripts without Slurm",
        "no Slurm needed here",
        "as many GPUs as there are",
        "fewer GPUs than there are",
        "resources of a job that is not run",
        "an empty secret",
        "a container with its image",
        "an adapter that is not merged",
        "one shard group",
        "a micro batch that does not divide",
        "steps win over epochs",
        "a model that fits into the GPUs",
        "GPUs too small for a job that is not run",
        "a model of unknown shape",
        "GPUs of which none is used",
    ],
)
def test_configs_that_are_allowed(
    compose: Compose, words: tuple[str, ...], values: dict[str, Any], facts: Facts
) -> None:
    assert messages(put(compose(*words), values), facts) == []


def minimums(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every key of a config whose schema has a minimum."""
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from minimums(value, f"{prefix}{item.name}.")
        elif "minimum" in item.metadata:
            yield prefix + item.name, item.metadata["minimum"]


def test_all_numbers_below_their_minimum_are_reported(compose: Compose) -> None:
    config = compose(*SLURM)
    lowest = dict(minimums(config))
    reported = problems(put(config, {key: minimum - 1 for key, minimum in lowest.items()}), Facts())
    for problem, (key, minimum) in zip(reported, lowest.items(), strict=False):
        assert (problem.key, problem.value) == (key, minimum - 1)
        assert problem.message.startswith((f"must be at least {minimum:g}", "must be above 0"))
    assert {"train.steps", "cluster.train.nodes", "cluster.cpu.time_min", "model.architecture.hidden_size"} <= set(
        lowest
    )


def test_every_number_may_be_its_minimum(compose: Compose) -> None:
    config = compose(*SLURM)
    reported = messages(put(config, dict(minimums(config))))
    assert not [message for message in reported if "must be at least" in message]


def test_problems_of_several_rules_are_reported_together(compose: Compose, tmp_path: Path) -> None:
    config = put(compose(), {"name": "a b", "cluster.train.nodes": 2, "data.validation_fraction": 0.9})
    reported = problems(config, Facts(run_dir_error="no", files_missing=(("data.path", str(tmp_path)),)))
    assert [problem.key for problem in reported] == [
        "data.validation_fraction",
        "name",
        "data.path",
        "run_dir",
    ]


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "TOKENIZER_PATH", "MAX_TOKENS"])
def test_a_variable_that_is_no_secret_can_be_set(compose: Compose, name: str) -> None:
    assert messages(put(compose(), {"cluster.environment": {name: "7"}})) == []


@pytest.mark.parametrize(
    "values",
    [
        {"data.path": ""},
        {"model.source": ""},
        {"train.epochs": 0.0},
        {"train.learning_rate": float("nan")},
        {"adapter.dropout": 1.5},
        {"cluster.environment": {"A-B": "1"}},
        {"cluster.network.interface": ""},
        {"run_dir": "/runs/50%j"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_value_that_no_job_can_use_is_refused(compose: Compose, values: dict[str, Any]) -> None:
    assert [message for message in messages(put(compose(*SLURM), values)) if message.startswith(next(iter(values)))]


@pytest.mark.site(
    "A run folder with a colon in its name (`2026-11-28T15:30:00`)",
    "the jobs ran the installed code instead of the run's own, without a word",
    "refused before submission, because PYTHONPATH is split at colons",
)
def test_a_run_folder_with_a_colon_is_refused(compose: Compose) -> None:
    [message] = messages(put(compose(*SLURM), {"run_dir": "/runs/2026-11-28T15:30:00"}))
    assert message.startswith("run_dir=/runs/2026-11-28T15:30:00: must not contain ':': PYTHONPATH is split there")
    assert messages(put(compose(*SLURM), {"run_dir": "/runs/2026-11-28T15.30.00"})) == []
