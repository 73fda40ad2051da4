"""launcher/check/sweep_words.py and sweep_rules.py: the runs of a sweep, their names, and what is refused."""

from pathlib import Path

import pytest

from conf.errors import ConfigError, Problem
from launcher.check import sweep_rules, sweep_words
from launcher.check.sweep_words import Combination
from tests.conftest import Compose, put


def names(*words: str) -> list[str]:
    return [item.name for item in sweep_words.combinations(["-m", *words])]


def test_every_combination_is_a_run_named_by_its_values_as_they_are_typed() -> None:
    found = sweep_words.combinations(["train.learning_rate=1e-4,2e-4", "model=tiny", "-m", "adapter.r=8,16"])
    assert [item.name for item in found] == [
        "train.learning_rate=1e-4--adapter.r=8",
        "train.learning_rate=1e-4--adapter.r=16",
        "train.learning_rate=2e-4--adapter.r=8",
        "train.learning_rate=2e-4--adapter.r=16",
    ]
    assert found[1] == Combination(
        "train.learning_rate=1e-4--adapter.r=16",
        {"train.learning_rate": "1e-4", "adapter.r": "16"},
        ["train.learning_rate=1e-4", "model=tiny", "adapter.r=16"],
    )


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.seed=range(1,3)", ["train.seed=1", "train.seed=2"]),
        ("train.seed=range(0,3)", ["train.seed=0", "train.seed=1", "train.seed=2"]),
        ("data.path=/a b/x.jsonl,../y.jsonl", ["data.path=a-b-x.jsonl", "data.path=..-y.jsonl"]),
        ("data.path=a%j,a:j", ["data.path=a-j", "data.path=a-j--2"]),
        ("adapter.targets=[q_proj,v_proj],[all-linear]", ["adapter.targets=q_proj-v_proj", "adapter.targets=all-linear"]),
        ("++cluster.environment.A=1,2", ["cluster.environment.A=1", "cluster.environment.A=2"]),
        ('data.path="ä.jsonl","b c"', ["data.path=.jsonl", "data.path=b-c"]),
    ],
)  # fmt: skip
def test_a_name_is_safe_in_paths_shells_and_slurm(word: str, expected: list[str]) -> None:
    assert names(word) == expected


def test_long_names_are_cut_and_stay_different() -> None:
    found = names(f"data.path={'x' * 200}1,{'x' * 200}2")
    assert len(set(found)) == 2
    assert all(len(name) < 140 for name in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.seed=1"], "KEY=VALUE: no key has several values. Write KEY=a,b"),
        (["train.seed=1,1"], "train.seed=1,1: has the same value twice"),
        (["train.seed=range(0,2000)"], "KEY=VALUE: has more than 1000 runs"),
        (["run_dir=a,b"], "run_dir=a,b: must have one value"),
        (["sweep.at_once=1,2"], "sweep.at_once=1,2: must have one value"),
        (["resume=runs/a", "train.seed=1,2"], "resume=runs/a: continues a run or a sweep. Type muster resume"),
        (["model=glob(*)"], "model=glob(*): is a pattern. Write the values"),
        (["hydra/sweeper=optuna", "train.seed=1,2"], "hydra/sweeper=optuna: has no effect"),
        (["submit=script", "train.seed=1,2"], "submit=script: writes the scripts of one run"),
        (["--cfg", "job", "train.seed=1,2"], "--cfg: is not for a sweep"),
    ],
)
def test_what_makes_no_sense_for_several_runs_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        names(*words)
    assert str(error.value).startswith(message)


def test_the_problems_of_all_runs_are_reported_once_each() -> None:
    runs = [Combination(name, {}, []) for name in ("a", "b", "c")]

    def check(run: Combination) -> None:
        of_some = [Problem("train.seed", 7, "bad")] if run.name != "b" else []
        raise ConfigError(Problem("model", None, "no such model"), *of_some)

    with pytest.raises(ConfigError) as error:
        sweep_words.for_each(runs, check)
    assert str(error.value).splitlines() == ["model: no such model", "train.seed=7: bad (in a and 1 more)"]


def test_a_sweep_over_models_has_a_neutral_name(compose: Compose) -> None:
    one, other = compose("model=tiny", "run_dir=/runs/${name}-1"), compose("model=llama8b", "run_dir=/runs/${name}-1")
    assert Path(sweep_words.folder([one, one])).name == "tiny-sample-fsdp-1"
    assert Path(sweep_words.folder([one, other])).name == "sweep-1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sweep.stop_worst": "half"}, "sweep.stop_worst=half: is not of the form 0.5@25%"),
        ({"sweep.stop_worst": "0.5@99%", "train.steps": 10}, "sweep.stop_worst=0.5@99%: is the last step of train.steps=10"),
        ({"sweep.stop_worst": "0.5@50%", "jobs": ["custom"]}, "sweep.stop_worst=0.5@50%: cannot see the losses"),
        ({"sweep.at_once": 2}, "sweep.at_once=2: cluster=local runs one training after the other"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_used_is_refused(compose: Compose, values: dict[str, object], message: str) -> None:
    [problem] = sweep_rules.problems(put(compose(), values))
    assert str(problem).startswith(message)


def test_merging_all_runs_needs_something_to_merge(compose: Compose) -> None:
    [problem] = sweep_rules.problems(compose("pipeline=train", "sweep.merge=all"))
    assert str(problem).startswith("sweep.merge=all: has no effect, because the jobs end with training")


def test_runs_that_do_not_fit_together_are_refused(compose: Compose) -> None:
    def across(*values: dict[str, object]) -> list[str]:
        found = sweep_rules.across([put(compose("cluster=slurm", "model=llama8b"), item) for item in values])
        return [str(problem).split(":")[0] for problem in found]

    assert across({}, {"train.seed": 1}) == []
    assert across({"jobs": ["train"]}, {}) == ["jobs"]
    assert across({"cluster.cpu.memory_gib": 7}, {}) == ["sweep.merge=best"]
    both = put(
        compose("cluster=slurm", "model=llama8b", "sweep.merge=all"), {"hub.push": "me/x", "jobs": ["train", "push"]}
    )
    assert [str(item).split(":")[0] for item in sweep_rules.across([both, both])] == ["hub.push=me/x"]
    assert [item.key for item in sweep_rules.across([put(both, {"jobs": ["push"]})] * 2)] == ["hub.push"]
    local = compose("model=llama8b")
    assert "cluster" in [item.key for item in sweep_rules.across([both, local])]
