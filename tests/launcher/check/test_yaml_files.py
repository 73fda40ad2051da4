"""launcher/check/yaml_files.py: what is wrong in files of config groups, with file, line, key and a suggestion."""

from pathlib import Path

import pytest

from launcher.check import yaml_files
from tests.conftest import ROOT, Launch

GLOBAL = "# @package _global_\n"


def found(tmp_path: Path, name: str, text: str, *words: str) -> list[str]:
    """The messages about one file, without the path of its folder."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    problems = yaml_files.problems(words, [ROOT / "conf", tmp_path])
    return [str(problem).removeprefix(f"{tmp_path}/") for problem in problems]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("experiment/zz", f"{GLOBAL}train:\n  stepz: 3\n", ":3: train.stepz: no such key: did you mean 'train.steps'?"),
        ("experiment/zz", f"{GLOBAL}train:\n  learning_rate: fast\n", ":3: train.learning_rate=fast: must be a number"),
        ("experiment/zz", f"{GLOBAL}train:\n  learning_rate: 1\n bad: x\n", ":4: is not YAML: expected <block end>"),
        ("experiment/zz", f"{GLOBAL}train: 3\n", ":2: train=3: has keys of its own"),
        ("experiment/zz", f"{GLOBAL}train:\n  steps: 3\n  steps: 4\n", ":4: train.steps: is there twice"),
        ("experiment/zz", f"{GLOBAL}train:\n  lr: 1\n", ":3: train.lr: no such key: use train.learning_rate"),
        (
            "experiment/zz",
            f"{GLOBAL}defaults:\n  - override /modle: tiny\n",
            ": defaults=modle: no such group: did you mean 'model'",
        ),
        (
            "experiment/zz",
            f"{GLOBAL}defaults:\n  - model: tiny\n",
            ": defaults=model: tiny: must replace one. Write - override /m",
        ),
        (
            "experiment/zz",
            f"{GLOBAL}defaults:\n  - override /model: tony\n",
            ": defaults: model=tony: no such option: did you mean",
        ),
        ("experiment/zz", "train:\n  steps: 3\n", ":1: must begin with the line # @package _global_"),
        ("experiment/zz", "- a\n", ":1: has no keys"),
        (
            "cluster/zz",
            "name: a\npartiton: gpu\n",
            ":2: cluster.partiton: no such key: did you mean 'cluster.partition'?",
        ),
        ("cluster/zz", "train: {nodes: many}\n", ":1: cluster.train.nodes=many: must be a whole number"),
        ("model/zz", "name: a\narchitecture: {vocab_sise: 3}\n", ":2: model.architecture.vocab_sise: no such key"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (shown,) = found(tmp_path, f"{name}.yaml", text, f"{name.split('/')[0]}=zz")
    assert shown.startswith(f"{name}.yaml{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {time_min: 12:30:00}\n",
            ":1: cluster.train.time_min=12:30:00: YAML reads this as 45000. Write 750, in minutes",
        ),
        (
            "train: {nodes: 010}\n",
            ":1: cluster.train.nodes=010: YAML reads this as 8. Put it into quotes if it is text",
        ),
        ("train:\n  exclusive: 2\n", ":2: cluster.train.exclusive=2: must be true or false"),
        ("train: {sbatch: {qos: a}}\ntrain: {nodes: 2}\n", ":2: cluster.train: is there twice. Remove one of them"),
        ("train: {sbatch: {begin: '16:00', comment: '010'}, time_min: 90, exclusive: yes}\n", None),
    ],
)
def test_what_yaml_reads_otherwise_than_it_is_meant(tmp_path: Path, text: str, message: str | None) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/zz.yaml").write_text(text)
    shown = [str(problem) for problem in yaml_files.misread(["cluster=zz"], [ROOT / "conf", tmp_path])]
    assert shown == ([f"{tmp_path}/cluster/zz.yaml{message}"] if message else [])


def test_files_that_an_experiment_chooses_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/mine.yaml").write_text("partiton: gpu\n")
    text = f"{GLOBAL}defaults:\n  - override /cluster: mine\n"
    (shown,) = found(tmp_path, "experiment/zz.yaml", text, "experiment=zz")
    assert shown.startswith("cluster/mine.yaml:1: cluster.partiton")


def test_right_values_pass(tmp_path: Path) -> None:
    text = f"""{GLOBAL}defaults:
  - override /model: llama8b
train: {{learning_rate: 2e-4, lr_schedule: linear, steps: null}}
data: {{fields: {{a: b}}, sets: {{mine: {{path: x}}}}, path: "${{oc.env:HOME}}/x"}}
cluster: {{train: {{sbatch: {{gres: "gpu:8"}}}}}}
"""
    assert found(tmp_path, "experiment/zz.yaml", text, "experiment=zz") == []


@pytest.mark.parametrize(
    "group", ["cluster", "data", "experiment", "model", "parallel", "pipeline", "tracker", "train"]
)
def test_musters_own_files_pass(group: str) -> None:
    options = ",".join(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
    assert yaml_files.problems([f"{group}={options}"], [ROOT / "conf"]) == []
    assert yaml_files.misread([f"{group}={options}"], [ROOT / "conf"]) == []


def test_an_experiment_given_by_path_is_checked_by_the_launch(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("train:\n  stepz: 3\n")
    done = launch("my.yaml", "dry_run=true")
    assert done.returncode == 2
    assert done.stderr == f"launch.py: {tmp_path}/my.yaml:2: train.stepz: no such key: did you mean 'train.steps'?\n"
