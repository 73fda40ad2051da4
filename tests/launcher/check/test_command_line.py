"""launcher/check/command_line.py: what is wrong with the words of a command line, with the nearest right one, all at once."""

import pytest

from launcher.check import command_line
from tests.conftest import ROOT


def said(*words: str) -> list[str]:
    return [str(problem) for problem in command_line.problems(list(words), ROOT / "conf")]


@pytest.mark.parametrize(
    ("word", "key", "remedy"),
    [
        ("modle=tiny", "modle", "did you mean 'model'"),
        ("experiments=llama8b_fsdp", "experiments", "did you mean 'experiment'"),
        ("model=llama7b", "model=llama7b", "Choose from hub, llama405b, llama70b"),
        ("parallel=zero4", "parallel=zero4", "did you mean 'zero"),
        ("adapter=loora", "adapter=loora", "did you mean 'lora'"),
        ("experiment=llama70b_zero", "experiment=llama70b_zero", "did you mean 'llama70b_zero3'"),
        ("cluster=perlmutter", "cluster=perlmutter", "Choose from local, slurm"),
        ("model=null", "model=None", "Choose from hub"),
        ("~model", "model=None", "Choose from hub"),
        ("trian.steps=7", "trian.steps", "did you mean 'train.steps'"),
        ("train.step=7", "train.step", "did you mean 'train.steps'"),
        ("learning_rate=7", "learning_rate", "did you mean 'train.learning_rate'"),
        ("+train.stepz=7", "train.stepz", "did you mean 'train.steps'"),
        ("++train.stepz=7", "train.stepz", "did you mean 'train.steps'"),
        ("+model.architecture.layers=7", "model.architecture.layers", "no such key"),
        ("~train.steps", "train.steps", "set it to null"),
        ("train.steps=many", "train.steps=many", "a whole number or null"),
        ("train.global_batch=1.5", "train.global_batch=1.5", "a whole number"),
        ("train.global_batch=null", "train.global_batch", "a whole number"),
        ("train.learning_rate=fast", "train.learning_rate=fast", "a number"),
        ("train.fingerprint=maybe", "train.fingerprint=maybe", "true or false"),
        ("train.precision=fp8", "train.precision=fp8", "one of auto, fp32, bf16"),
        ("cluster.container=docker", "cluster.container=docker", "one of none, apptainer, pyxis"),
        ("tracker=mlflow", "tracker=mlflow", "one of none, tensorboard, wandb"),
        ("jobs=train", "jobs=train", "list"),
        ("train", "train", "key=value"),
        ("steps 7", "steps 7", "key=value"),
        ("name='a", "name='a", "quote"),
    ],
)
def test_a_wrong_word_is_named_with_its_remedy(word: str, key: str, remedy: str) -> None:
    [message] = said(word)
    assert message.startswith(f"{key}: "), message
    assert remedy in message


def test_a_shape_that_the_model_does_not_have_is_an_error_with_a_remedy() -> None:
    [message] = said("model=hub", "model.source=x", "model.architecture={model_type: llama}")
    assert "Remove this override" in message
    [message] = said("model=hub", "model.source=x", "model.architecture.extra.rms_norm_eps=1e-5")
    assert "Remove this override" in message
    found = said("model=hub", "model.source=x", "model.architecture.hidden_size=64", "model.architecture.layers=2")
    assert len(found) == 2
    assert "model.architecture.layers: no such key" in found[0]
    assert found[1].startswith("model.architecture.hidden_size=64: model=hub reads its shape from config.json")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model=tiny", "model.architecture.hidden_size=64"],
        ["model=llama70b", "parallel=zero3", "cluster=slurm", "dry_run=true"],
        ["experiment=null"],
        ["experiment=qwen72b_hsdp", "pipeline=checked"],
        ["train.steps=7", "train.epochs=null", "train.learning_rate=1e-4", "train.learning_rate=1"],
        ["jobs=[preprocess,train]", "cluster.modules=[gcc,cuda]"],
        ["+cluster.environment.NCCL_DEBUG=INFO", "++cluster.train.sbatch.gres=gpu:a100:8", "+train.steps=7"],
        ["+model.architecture.extra.head_dim=64", "model.architecture.hidden_size=256"],
        ["name=${model.name}-7", "train.eval_every=${train.save_every}"],
        ["--multirun", "train.steps=7,8"],
        ["hydra.verbose=true", "hydra/job_logging=default"],
        ["--cfg", "job"],
        ["-c", "all", "--resolve"],
        ["--info", "defaults"],
        ["--config-dir", "/site/conf", "--package", "train"],
        ["--help"],
    ],
    ids=" ".join,
)
def test_right_words_pass(words: list[str]) -> None:
    assert said(*words) == []


def test_a_flag_takes_one_value_only() -> None:
    assert said("--cfg", "job", "nonsense") == [said("nonsense")[0]]


def test_all_wrong_words_are_named_at_once_in_their_order() -> None:
    found = said("train.steps=many", "model=tiny", "trian.steps=7", "model=llama7b", "nonsense")
    assert [message.split(":")[0] for message in found] == [
        "train.steps=many",
        "trian.steps",
        "model=llama7b",
        "nonsense",
    ]


@pytest.mark.parametrize(
    ("word", "candidates", "expected"),
    [
        ("nodess", ["nodes", "time"], ": did you mean 'nodes'?"),
        ("nodes", ["cluster.train.nodes"], ": did you mean 'cluster.train.nodes'?"),
        ("zzz", ["nodes", "time"], ""),
    ],
)
def test_only_a_near_word_is_suggested(word: str, candidates: list[str], expected: str) -> None:
    assert command_line.nearest(word, candidates) == expected


def test_groups_are_folders_with_their_options() -> None:
    found = command_line.groups(ROOT / "conf")
    assert found["cluster"] == ["local", "slurm"]
    assert "zero3" in found["parallel"]
    assert "train_for" not in found
