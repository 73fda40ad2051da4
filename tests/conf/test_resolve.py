"""conf/: every option of every group makes a config that can be submitted, stored and read back."""

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf import resolve
from conf.errors import ConfigError
from conf.schema import Config
from launcher.check import rules
from launcher.check.observe import Facts
from tests.conftest import ROOT, Compose, put

OPTIONS = sorted((path.parent.name, path.stem) for path in (ROOT / "conf").glob("*/*.yaml"))
BASE = {"model": "model=llama8b", "cluster": "cluster=slurm"}
"""A model and a cluster that work with every option of the other groups."""
NEEDS = {
    "pipeline=custom": ['custom.command="python train.py"'],
    "model=hub": ["model.source=owner/name"],
    "model=tiny": ["train.global_batch=512"],
    "data=jsonl": ["data.path=owner/name"],
    "data=mix": ["+data.sets.a.path=owner/name", "+data.sets.b.path=owner/other", "+data.sets.b.weight=2"],
    "train=smoke": ["cluster.train.nodes=2"],
    "pipeline=push": ["hub.push=owner/name"],
    "cluster=local": ["train.micro_batch=1"],
}
"""Other overrides that an option needs."""


def option_words(group: str, option: str) -> list[str]:
    """The command line that a user of this option would write."""
    word = f"{group}={option}"
    base = {} if group == "experiment" else BASE | {group: word}
    return [*base.values(), *([] if word in base.values() else [word]), *NEEDS.get(word, [])]


def test_the_groups_are_found() -> None:
    names = {group for group, _ in OPTIONS}
    assert names == {"model", "data", "parallel", "adapter", "train", "cluster", "pipeline", "experiment", "tracker"}


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["=".join(item) for item in OPTIONS])
def test_every_option_can_be_submitted(compose: Compose, group: str, option: str) -> None:
    assert rules.problems(compose(*option_words(group, option)), Facts()) == []


NAMED = [(group, option) for group, option in OPTIONS if group in ("model", "data", "parallel", "cluster")]


@pytest.mark.parametrize(("group", "option"), NAMED, ids=["=".join(item) for item in NAMED])
def test_an_option_has_the_name_of_its_file(compose: Compose, group: str, option: str) -> None:
    assert getattr(compose(*option_words(group, option)), group).name == option


@pytest.mark.parametrize("path", sorted((ROOT / "conf/train_for").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_values_of_train_for_are_applied_after_train(compose: Compose, path: Path) -> None:
    config, written = compose(f"{path.parent.name}={path.stem}"), OmegaConf.load(path)
    assert {key: getattr(config.train, str(key)) for key in written} == dict(written)


@pytest.mark.parametrize("path", sorted((ROOT / "conf/train_for").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_file_in_train_for_belongs_to_an_option(path: Path) -> None:
    assert (path.parent.name, path.stem) in OPTIONS


def test_the_command_line_overrides_values_of_train_for(compose: Compose) -> None:
    config = compose("model=tiny", "adapter=lora", "train.learning_rate=0.5", "train.micro_batch=4")
    assert (config.train.learning_rate, config.train.micro_batch) == (0.5, 4)


def test_an_experiment_can_still_be_changed(compose: Compose) -> None:
    config = compose("experiment=llama70b_zero3", "cluster.train.nodes=16", "parallel=zero2")
    assert (config.model.name, config.cluster.train.nodes, config.parallel.name) == ("llama70b", 16, "zero2")


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "parallel"])
def test_a_stored_config_is_read_back_the_same(compose: Compose, tmp_path: Path, option: str) -> None:
    config = compose("cluster=slurm", "model=llama8b", f"parallel={option}", "experiment=llama8b_lora")
    put(config, {"cluster.environment": {"A": "it's $x: 1"}, "cluster.setup": ["echo '{a}' # b"], "data.max_rows": 7})
    resolve.save(config, tmp_path / "config.yaml")
    assert resolve.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({"jobs": ["train"]}, True),
        ({"resume": "/runs/a"}, True),
        ({"dry_run": True}, True),
        ({"submit": "script"}, True),
        ({"train.steps": 7}, False),
        ({"cluster.train.nodes": 7}, False),
        ({"cluster.environment": {"A": "1"}}, False),
        ({"model.architecture.extra": {"head_dim": 7}}, False),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_the_digest_depends_on_the_run_and_not_on_the_launch(
    compose: Compose, values: dict[str, object], same: bool
) -> None:
    assert (resolve.digest(put(compose(), values)) == resolve.digest(compose())) is same


def test_the_digest_does_not_depend_on_the_process(compose: Compose, tmp_path: Path) -> None:
    config = compose("cluster=slurm", "model=llama8b")
    resolve.save(config, tmp_path / "config.yaml")
    assert resolve.digest(resolve.load(tmp_path / "config.yaml")) == resolve.digest(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", 7, "tokens: no such key"),
        ("train.stepz", 7, "train.stepz: no such key"),
        ("cluster.network.port", 7, "cluster.network.port: no such key"),
        ("train.learning_rate", "???", "train.learning_rate: needs a value"),
        ("data.path", "???", "data.path: needs a value"),
        ("data.sets", {"a": {"path": "x", "wait": 2}}, "data.sets.a.wait: no such key"),
        ("data.sets", {"a": {"weight": 2}}, "data.sets.a.path: needs a value"),
        ("data.sets", {"a": {"path": "x", "weight": "two"}}, "data.sets.a.weight: .*two"),
        ("data.sets", {"a": 3}, "data.sets.a=3: must be a section"),
        ("train.steps", "many", "train.steps: .*many"),
        ("train.activation_checkpointing", "maybe", "train.activation_checkpointing: .*maybe"),
        ("parallel.backend", "horovod", "parallel.backend: .*horovod"),
        ("cluster.modules", {"a": 1}, "cluster.modules=.* must be a list"),
        ("cluster.modules", "a", "cluster.modules=a: must be a list"),
        ("data.sets", {"a": {"path": "x", "files": "y"}}, "data.sets.a.files=y: must be a list"),
        ("data.sets", {"a": {"path": "x", "fields": "y"}}, "data.sets.a.fields=y: must be a dictionary"),
        ("data.train_on", ["boss"], "data.train_on=.*boss.*a list of system, user, assistant or tool"),
        ("data.train_on", [["assistant"]], "data.train_on=.*a list of system, user, assistant or tool"),
        ("data.train_on", "assistant", r"data.train_on=assistant: .*for example \[assistant,tool\]"),
        ("name", "${nowhere}", "name: .*nowhere"),
    ],
)
def test_a_stored_config_that_does_not_match_the_schema_is_refused_by_key(
    compose: Compose, tmp_path: Path, key: str, value: object, message: str
) -> None:
    stored = OmegaConf.create(resolve.dump(compose()))
    OmegaConf.update(stored, key, value, merge=False)
    OmegaConf.save(stored, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=message):
        resolve.load(tmp_path / "config.yaml")


def test_all_missing_values_are_named_at_once(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"data\.path(.|\n)*model\.source"):
        compose("model=hub", "data=jsonl")


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.yaml: no such file"):
        resolve.load(tmp_path / "config.yaml")


@pytest.mark.parametrize("content", [b"5", b"- a", b"a: [b", b"\xff\xfe"])
def test_a_file_that_is_no_config_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.yaml: is not the config of a run"):
        resolve.load(tmp_path / "config.yaml")


def test_a_file_is_parsed_once_and_its_reader_may_change_what_it_gets(compose: Compose, tmp_path: Path) -> None:
    path, stored = tmp_path / "config.yaml", compose("train.steps=5")
    resolve.save(stored, path)
    resolve.load(path).train.steps = 6
    parsed = resolve._parsed.cache_info().misses
    assert resolve.load(path).train.steps == 5
    assert resolve._parsed.cache_info().misses == parsed
    path.write_text(path.read_text(encoding="utf-8").replace("  steps: 5", "  steps: 7"), encoding="utf-8")
    assert resolve.load(path).train.steps == 7


def test_keys_include_optional_sections_but_not_entries_of_free_form_dictionaries() -> None:
    known = resolve.keys()
    assert {"train", "train.steps", "cluster.network.interface", "model.architecture.hidden_size"} <= set(known)
    assert not any(key.startswith(("cluster.environment.", "model.architecture.extra.")) for key in known)


def test_every_section_of_the_schema_is_in_the_stored_config(compose: Compose) -> None:
    stored = OmegaConf.create(resolve.dump(compose()))
    assert set(stored) == {item.name for item in fields(Config)} - set(resolve.LAUNCH_ONLY)
