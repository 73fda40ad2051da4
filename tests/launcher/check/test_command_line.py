"""launcher/check/command_line.py: all wrong overrides are reported, each with the nearest valid one."""

import pytest

from launcher.check import command_line
from tests.conftest import ROOT


def messages(*words: str) -> list[str]:
    return [str(problem) for problem in command_line.problems(list(words), ROOT / "conf")]


@pytest.mark.parametrize(
    ("word", "key", "remedy"),
    [
        ("modle=tiny", "modle", "did you mean 'model'"),
        ("experiments=llama8b_fsdp", "experiments", "did you mean 'experiment'"),
        ("model=llama7b", "model=llama7b", "Choose from gemma2_2b, gemma2_9b, gemma3_12b"),
        ("parallel=zero4", "parallel=zero4", "did you mean 'zero"),
        ("adapter=loora", "adapter=loora", "did you mean 'lora'"),
        ("experiment=llama70b_zero", "experiment=llama70b_zero", "did you mean 'llama70b_zero3'"),
        ("cluster=perlmutter", "cluster=perlmutter", "Choose from local, slurm"),
        ("model=null", "model=None", "Choose from gemma2_2b"),
        ("~model", "model=None", "Choose from gemma2_2b"),
        ("trian.steps=7", "trian.steps", "did you mean 'train.steps'"),
        ("train.step=7", "train.step", "did you mean 'train.steps'"),
        ("learning_rate=7", "learning_rate", "use train.learning_rate"),
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
        (
            "cluster.container.runtime=docker",
            "cluster.container.runtime=docker",
            "one of auto, apptainer, singularity, pyxis",
        ),
        ("cluster.container=apptainer", "cluster.container=apptainer", "Set one of cluster.container.image, "),
        ("cluster.container_image=/a.sif", "cluster.container_image", "did you mean 'cluster.container.image'?"),
        ("train.lr=1e-4", "train.lr", "use train.learning_rate"),
        ("lora_r=8", "lora_r", "use adapter.r"),
        ("batch_size=8", "batch_size", "train.global_batch"),
        ("gradient_accumulation_steps=8", "gradient_accumulation_steps", "train.global_batch"),
        ("cutoff_len=8", "cutoff_len", "use data.max_length"),
        ("sequence_len=4096", "sequence_len", "use data.max_length"),
        ("partition=gpu", "partition", "use cluster.partition"),
        ("num_gpus=8", "num_gpus", "use cluster.gpus"),
        ("nodes=2", "nodes", "use cluster.gpus"),
        ("output_dir=x", "output_dir", "use run_dir"),
        ("report_to=wandb", "report_to", "use tracker"),
        ("base_model=x", "base_model", "use model.source"),
        ("load_in_4bit=true", "load_in_4bit", "use adapter=qlora"),
        ("num_train_epochs=3", "num_train_epochs", "use train.epochs"),
        ("hub_model_id=x", "hub_model_id", "use hub.push"),
        ("cluster.time=3", "cluster.time", "cluster.train.time_min"),
        ("tracker=mlfow", "tracker=mlfow", "did you mean 'mlflow'"),
        ("tracker=[wandb,mlfow]", "tracker=mlfow", "did you mean 'mlflow'"),
        ("jobs=train", "jobs=train", "list"),
        ("data.train_on=[boss]", "data.train_on=[boss]", "a list of system, user, assistant or tool"),
        ("data.train_on=assistant", "data.train_on=assistant", "for example [assistant,tool]"),
        ("train.profile_ranks=[a]", "train.profile_ranks=[a]", "a list of whole numbers, for example [0,1]"),
        ("train", "train", "key=value"),
        ("train.steps", "train.steps", "Type train.steps=VALUE"),
        ("train.steps:7", "train.steps:7", "Type train.steps=7"),
        ("--train.steps=7", "--train.steps", "without dashes: train.steps=7"),
        ("-train.steps=7", "-train.steps", "without dashes: train.steps=7"),
        ("--learning_rate=7", "--learning_rate", "use train.learning_rate"),
        ("train.learning_rate=1e\u22124", "train.learning_rate=1e\u22124", "Type train.learning_rate=1e-4"),
        ("train.optimizer=\u201cadamw\u201d", "train.optimizer=\u201cadamw\u201d", "Type train.optimizer=adamw"),
        ("adapter=[lora]", "adapter=[lora]", "Type adapter=lora"),
        ("parallel=ZeRO3", "parallel=ZeRO3", "did you mean 'zero3'"),
        ("train.optimizer=adamw_torch", "train.optimizer=adamw_torch", "did you mean 'adamw'"),
        ("data.packing=2", "data.packing=2", "true or false"),
        ("cluster.train.time_min=1-00:00:00", "cluster.train.time_min=1-00:00:00", "cluster.train.time_min=1440"),
        ("model=owner/name", "model=owner/name", "Write model=hub model.source=owner/name"),
        ("cluster=my/mine.yaml", "cluster=my/mine.yaml", "conf/cluster/mine.yaml, and type cluster=mine"),
        ("data=my.csv", "data=my.csv", "Write data=jsonl data.path=my.csv"),
        ("steps 7", "steps 7", "key=value"),
        ("name='a", "name='a", "quote"),
    ],
)
def test_a_wrong_override_is_reported_with_its_remedy(word: str, key: str, remedy: str) -> None:
    [message] = messages(word)
    assert message.startswith(f"{key}: "), message
    assert remedy in message


@pytest.mark.parametrize(
    "words", ["train.steps = 7", "train.steps= 7", "train.steps =7", "model=tiny train.steps = 7 --cfg job"]
)
def test_blanks_around_the_equals_sign_are_one_problem(words: str) -> None:
    [message] = messages(*words.split(" "))
    assert message.endswith("has blanks around the =. Type train.steps=7")


def test_keys_as_flags_take_their_values_with_them() -> None:
    first, second = messages("--train.steps", "7", "--model", "tiny", "-m", "--config-dir", "x")
    assert first.endswith(": train.steps=7")
    assert second.endswith(": model=tiny")


def test_a_shape_for_a_model_without_one_is_refused() -> None:
    [message] = messages("model=hub", "model.source=x", "model.architecture={model_type: llama}")
    assert "Remove this override" in message
    [message] = messages("model=hub", "model.source=x", "model.architecture.extra.rms_norm_eps=1e-5")
    assert "Remove this override" in message
    reported = messages(
        "model=hub", "model.source=x", "model.architecture.hidden_size=64", "model.architecture.layers=2"
    )
    assert len(reported) == 2
    assert "model.architecture.layers: no such key" in reported[0]
    assert reported[1].startswith("model.architecture.hidden_size=64: model=hub reads its shape from config.json")


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
def test_valid_overrides_pass(words: list[str]) -> None:
    assert messages(*words) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.steps=3,4", "-m", "dry_run=true"], ["-m", "train.steps=3,4", "dry_run=true"]),
        (["model=tiny", "--cfg", "job", "data=sample"], ["--cfg", "job", "model=tiny", "data=sample"]),
        (["experiment=llama8b_lora", "experiment=null", "model=tiny"], ["model=tiny"]),
        (["experiment=null", "experiment=llama8b_lora"], ["experiment=llama8b_lora"]),
    ],
    ids=" ".join,
)
def test_hydra_gets_flags_first_and_no_empty_experiment(words: list[str], expected: list[str]) -> None:
    assert command_line.in_hydras_order(words) == expected


@pytest.mark.parametrize("words", [["-cn", "axo"], ["--config-name=axo"], ["--config-path", "/x"]])
def test_another_main_config_is_refused(words: list[str]) -> None:
    (message,) = messages(*words)
    assert "launch.py FILE.yaml" in message


def test_a_flag_takes_one_value_only() -> None:
    assert messages("--cfg", "job", "nonsense") == [messages("nonsense")[0]]


def test_all_wrong_overrides_are_reported_in_their_order() -> None:
    reported = messages("train.steps=many", "model=tiny", "trian.steps=7", "model=llama7b", "nonsense")
    assert [message.split(":")[0] for message in reported] == [
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
def test_only_a_similar_word_is_suggested(word: str, candidates: list[str], expected: str) -> None:
    assert command_line.nearest(word, candidates) == expected


def test_groups_are_folders_with_their_options() -> None:
    options = command_line.groups(ROOT / "conf")
    assert options["cluster"] == ["local", "slurm"]
    assert "zero3" in options["parallel"]
    assert "train_for" not in options
