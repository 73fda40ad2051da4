"""Texts of a config: whatever stands in a key, nothing of it runs, and no line of a script is made of it."""

import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from conf import resolve
from conf.errors import ConfigError
from conf.schema import Config
from conf.schema_model import DataSet
from conf.text import problems as text_problems
from launcher.check import rules
from launcher.check.observe import Facts
from launcher.plan import plan
from launcher.submit import render
from tests.conftest import Compose, Programs, put, tool

LINES = ["x\ntouch CANARY\n#", "x\rtouch CANARY", "x\u2028touch CANARY", "x\u2029y", "x\x85touch CANARY", "x'\ntouch CANARY\n'",
         "gpu\n"]  # fmt: skip
OTHERS = ["x\0y", "x\x1b]0;y\x07", "x\x0by", "x\x0cy", "x\x1cy", "x\x7fy", "x\ty", "x\ud800y"]
SHELL = ["x$(touch CANARY)", "x`touch CANARY`", "x'; touch CANARY; '", 'x"; touch CANARY; "', "x; touch CANARY",
         "x\\'; touch CANARY #", "x && touch CANARY", "-x --y"]  # fmt: skip
PLAIN = ["$IFS", "x y", "*", "~", "!!", "{a,b}", "a=b", "a\\b", "it's"]
FREE = ("data.fields", "data.roles", "data.ignore", "data.template_kwargs", "data.end_of_turn", "data.eos_token", "data.pad_token",
        "data.special_tokens",
        "data.sets.a.fields", "data.sets.a.roles", "data.sets.a.ignore", "model.architecture.extra",
        "generate.system", "tracker.notes")  # fmt: skip
"""Keys that only the model, the tokenizer or a tracker sees."""


def text_keys(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, type) of every key whose value is, or has, a text that the user chooses."""
    hints = get_type_hints(type(section))
    for item in fields(section):
        key, hint = f"{prefix}{item.name}", str(hints[item.name])
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from text_keys(value, f"{key}.")
        elif "section" in item.metadata:
            for name, entry in value.items():
                yield from text_keys(entry, f"{key}.{name}.")
        elif hint in ("<class 'str'>", "str | None", "int | str | None") or hint.startswith(("list[str]", "dict[str")):
            yield key, hint


def hostile(hint: str, text: str) -> list[Any]:
    """Values of a key with this text: in a list as an item, in a dictionary as a value and as a name."""
    if hint.startswith("list"):
        return [[text]]
    return [{"name": text}, {text: "value"}] if hint.startswith("dict") else [text]


@pytest.fixture
def config(compose: Compose) -> Config:
    return compose("cluster=slurm", "model=llama8b", "pipeline=train")


@pytest.fixture
def with_sets(config: Config) -> Config:
    """The config with a named set, which has keys of its own."""
    config.data.sets = {"a": DataSet(path="rows.jsonl")}
    return config


def test_every_text_of_the_schema_is_walked(with_sets: Config) -> None:
    keys = [key for key, _ in text_keys(with_sets)]
    assert len(keys) > 55
    assert {"cluster.train.sbatch", "cluster.environment", "cluster.setup", "run_dir", "data.sets.a.path"} <= set(keys)


@pytest.mark.site(
    case="a config value has a line break, for example from a YAML block",
    before="the rest of it ran as a line of the batch script",
    after="refused, with the key and the character",
)
@pytest.mark.parametrize("text", [*LINES, *OTHERS], ids=ascii)
def test_a_character_that_ends_a_line_is_refused_in_every_key(with_sets: Config, text: str) -> None:
    for key, hint in text_keys(with_sets):
        *sections, name = key.split(".")
        target: Any = with_sets
        for section in sections:
            target = target[section] if isinstance(target, dict) else getattr(target, section)
        kept = getattr(target, name)
        for value in hostile(hint, text):
            setattr(target, name, value)
            reported = [str(problem) for problem in text_problems(with_sets)]
            if key in FREE:
                assert bool(reported) is (text == "x\ud800y"), key
            elif key == "cluster.setup" and text.replace("\n", "").replace("\t", "").isprintable():
                assert reported == []
            else:
                assert len(reported) == 1, f"{key} took {text!r}"
                assert reported[0].startswith(key)
                assert reported[0].isprintable()
                assert "in one line" in reported[0]
        setattr(target, name, kept)


@pytest.mark.parametrize(
    "text", ["name: |\n  gpu\n", "name: >\n  gpu\n", 'name: "gpu\\nid"', "name: |-\n  gpu\n  id\n"]
)
def test_a_block_of_yaml_is_refused_before_anything_else(config: Config, text: str, tmp_path: Path) -> None:
    stored = OmegaConf.create(resolve.dump(config))
    stored.cluster.account = OmegaConf.create(text).name
    OmegaConf.save(stored, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="cluster.account: 'gpu.n.* has a line break"):
        resolve.load(tmp_path / "config.yaml")


def test_the_rules_refuse_it_too(config: Config) -> None:
    config.cluster.account = "a\nb"
    assert [problem.key for problem in rules.problems(config, Facts())] == ["cluster.account"]


@pytest.mark.parametrize("text", SHELL, ids=ascii)
@pytest.mark.parametrize("image", [None, "a.sqsh", "a.sif"], ids=["no container", "pyxis", "apptainer"])
def test_nothing_of_a_value_runs(
    config: Config, tmp_path: Path, programs: Programs, text: str, image: str | None
) -> None:
    """All keys get the text at once. What the rules would refuse is rendered all the same."""
    fake = 'printf "MUSTER_ATTEMPT=1\\nready\\n"'
    folder = programs(srun="", module="", apptainer="", sbatch="echo 7", **{"fake-python": fake, "python3": fake})
    for name in ("kill", "cat", "env"):
        (folder / name).symlink_to(tool(name))
    for key, hint in text_keys(config):
        if key in ("jobs", "cluster.setup"):  # names that are checked, and the user's own shell
            continue
        values = hostile(hint, text)
        put(config, {key: values[0] if key != "cluster.environment" else {"NAME": text}})
    run = tmp_path / f"run {text.replace('/', '_')}"
    put(config, {"run_dir": str(run), "cluster.container.image": image, "cluster.python": "fake-python"})
    (run / "jobs/train/attempt-1").mkdir(parents=True)
    job = next(job for job in plan(config) if job.name == "train")
    for number, script in enumerate([
        render.sbatch_text(config, job),
        render.script_text(config, job, run / "config.yaml"),
        render.chain_text(config, [job]),
    ]):  # fmt: skip
        path = tmp_path / f"script-{number}"
        path.write_text(script)
        environ = {"PATH": str(folder), "HOME": str(tmp_path)}
        checked = subprocess.run([tool("bash"), "-n", path], env=environ, capture_output=True, text=True, timeout=60)
        assert (checked.returncode, checked.stderr) == (0, "")
        subprocess.run([tool("bash"), path], env=environ, cwd=tmp_path, capture_output=True, timeout=60)
        assert not list(tmp_path.rglob("CANARY")), script
        directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
        assert all(line.startswith("#SBATCH --") for line in directives)
    assert (folder / "srun.calls").read_text().count("\n") == 2, (
        "the scripts did not come to the line that starts the ranks"
    )


@pytest.mark.parametrize("sign", [":", "%", "\\"])
@pytest.mark.site(
    case="the run's path has a colon, as times of ISO 8601 do",
    before="jobs ran the code of the clone instead of their copy",
    after="refused, with the reason",
)
def test_a_sign_that_splits_the_path_of_the_run_is_refused(config: Config, sign: str) -> None:
    config.run_dir = f"/runs/a{sign}b"
    [message] = [str(problem) for problem in rules.problems(config, Facts())]
    assert message.startswith(f"run_dir=/runs/a{sign}b: must not contain '{sign}': ")


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "hi"', "a,b", "a=b", "a#b", "a$b", "a;b", "é日本", "a(1)", "a[1]", "{a}", "a&b"]
)
def test_any_other_path_of_a_run_is_taken(config: Config, name: str) -> None:
    config.run_dir = f"/runs/{name}"
    assert list(rules.problems(config, Facts())) == []


@pytest.mark.parametrize("name", ["HF TOKEN", "HF-TOKEN", "HF_TOKEN=x", "1A", "", "é"])
def test_the_name_of_a_secret_is_that_of_a_variable(config: Config, name: str) -> None:
    config.cluster.secrets = [name]
    assert "cluster.secrets" in [problem.key for problem in rules.problems(config, Facts())]


def test_ranks_get_the_values_as_they_are(config: Config, tmp_path: Path, programs: Programs) -> None:
    """Quotes and signs of the shell arrive in the environment of srun."""
    fake = 'printf "MUSTER_ATTEMPT=1\\nready\\n"'
    dump = f"{tool('env')} -0 > {tmp_path}/environment"
    folder = programs(srun=dump, **{"fake-python": fake})
    for name in ("kill", "cat"):
        (folder / name).symlink_to(tool(name))
    run = tmp_path / """it's "$HOME" a,b=c #d"""
    (run / "jobs/train/attempt-1").mkdir(parents=True)
    values = {f"V{number}": text for number, text in enumerate([*SHELL, *PLAIN])}
    put(config, {"run_dir": str(run), "cluster.python": "fake-python", "cluster.environment": values})
    job = next(job for job in plan(config) if job.name == "train")
    script = render.sbatch_text(config, job)
    environ = {"PATH": str(folder), "HOME": str(tmp_path)}
    done = subprocess.run([tool("bash"), "-s"], input=script, env=environ, capture_output=True, text=True, timeout=60)
    entries = (tmp_path / "environment").read_text().split("\0")
    got = dict(entry.split("=", 1) for entry in entries if entry)
    assert {name: got[name] for name in values} == values, done.stderr
    assert got["PYTHONPATH"] == f"{run}/code"
    assert got["MUSTER_RUN"] == str(run)
