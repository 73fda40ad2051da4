"""launcher/check/resume.py: what a resumed run keeps, what may change, and which of its jobs are done."""

import json
from pathlib import Path

import pytest

from conf import resolve
from conf.errors import RunError
from conf.schema import Config
from launcher.check import resume
from launcher.check.command_line import groups
from launcher.supervise import attempt
from tests.conftest import ROOT, Compose, put
from tests.launcher.check.test_adapter_source import adapter, localized

BASE = ("cluster=slurm", "model=llama8b", "parallel=zero3")


@pytest.fixture
def run(compose: Compose, tmp_path: Path) -> Path:
    """The folder of a run that was launched with BASE."""
    config = put(compose(*BASE), {"run_dir": str(tmp_path / "run")})
    resolve.save(config, tmp_path / "run/config.yaml")
    return tmp_path / "run"


def continued(compose: Compose, run: Path, *words: str) -> Config:
    """The config of `launch.py resume=RUN words...`."""
    composed = put(compose(*words), {"resume": str(run)})
    return resume.resumed_config(composed, [f"resume={run}", *words])


def test_a_resumed_run_keeps_its_config(compose: Compose, run: Path) -> None:
    assert continued(compose, run) == put(resolve.load(run / "config.yaml"), {"resume": str(run)})


def test_a_moved_run_resumes_in_its_new_folder(compose: Compose, run: Path) -> None:
    moved = run.rename(run.with_name("moved"))
    config = continued(compose, moved)
    assert (config.run_dir, config.resume) == (str(moved), str(moved))


def test_a_relative_folder_starts_at_the_current_folder(
    compose: Compose, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    assert continued(compose, Path("run")).run_dir == str(run)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.epochs=7", "train.epochs", 7.0),
        ("train.learning_rate=0.5", "train.learning_rate", 0.5),
        ("train.resume_step=7", "train.resume_step", 7),
        ("train.save_every=7", "train.save_every", 7),
        ("train.micro_batch=2", "train.micro_batch", 2),
        ("cluster.train.nodes=8", "cluster.train.nodes", 8),
        ("cluster=local", "cluster.name", "local"),
        ("pipeline=consolidate", "jobs", ["consolidate"]),
        ("jobs=[train]", "jobs", ["train"]),
        ("consolidate.dtype=fp16", "consolidate.dtype.name", "fp16"),
        ("dry_run=true", "dry_run", True),
        ("submit=script", "submit.name", "script"),
        ("tracker=wandb", "tracker.wandb", True),
        ("+train.steps=7", "train.steps", 7),
        ("+cluster.environment.MINE=7", "cluster.environment", {"MINE": "7"}),
    ],
)
def test_keys_of_where_and_how_long_it_runs_may_change(
    compose: Compose, run: Path, word: str, key: str, value: object
) -> None:
    current: object = continued(compose, run, word)
    for name in key.split("."):
        current = getattr(current, name)
    assert current == value


def test_a_change_leaves_other_keys_unchanged(compose: Compose, run: Path) -> None:
    config = continued(compose, run, "cluster=local", "cluster.train.ranks_per_node=4", "pipeline=train")
    assert config.cluster.train.ranks_per_node == 4
    assert (config.model.name, config.parallel.name, config.train.epochs) == ("llama8b", "zero3", 3)


@pytest.mark.parametrize(
    "word",
    [
        "train.weight_decay=0.5",
        "train.global_batch=128",
        "train.seed=7",
        "model=tiny",
        "model.source=owner/name",
        "data=alpaca",
        "data.max_rows=7",
        "adapter=lora",
        "experiment=llama8b_fsdp",
        "name=other",
        "run_dir=/elsewhere",
        "++train.weight_decay=0.5",
    ],
)
def test_keys_of_what_is_computed_may_not_change_once_it_has_trained(compose: Compose, run: Path, word: str) -> None:
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 2.0}\n{"step": 1, "loss": 2.0}\n')
    with pytest.raises(RunError, match="cannot change in a run that has trained. Start a new run") as caught:
        continued(compose, run, word)
    assert str(caught.value).startswith(word.lstrip("+").split("=")[0] + ":")


def test_a_checkpoint_is_a_trace_of_training(compose: Compose, run: Path) -> None:
    (run / "checkpoints").mkdir()
    assert not resume.has_trained(run)
    (run / "checkpoints/step-00000010").mkdir()
    assert resume.has_trained(run)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["train.learning_rate=0.5"], "train.learning_rate", 0.5),
        (["data=alpaca", "data.max_rows=7"], "data.max_rows", 7),
        (["model=tiny"], "model.name", "tiny"),
        (["adapter=lora"], "adapter.kind.name", "lora"),
    ],
)
def test_until_a_run_has_trained_its_keys_may_change(
    compose: Compose, run: Path, words: list[str], key: str, value: object
) -> None:
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 2.0}\n')
    config = continued(compose, run, *words)
    current: object = config
    for name in key.split("."):
        current = getattr(current, name)
    assert current == value
    assert config.parallel.name == "zero3"


def test_the_shape_of_another_model_is_read_again(compose: Compose, run: Path, tmp_path: Path) -> None:
    """It was stored with the run. With that of the model before, estimates and checks would be of another model."""
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 500,
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    config = continued(compose, run, f"model.source={tmp_path}/other")
    assert config.model.architecture is not None
    assert (config.model.architecture.hidden_size, config.model.architecture.num_hidden_layers) == (48, 3)


def test_the_settings_of_another_adapter_are_read_again(compose: Compose, tmp_path: Path) -> None:
    """What was read from the adapter before is stored in the run, and must not stay."""
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second", r=4, target_modules=["k_proj"])
    config = put(localized(compose, first, *BASE, "adapter=lora"), {"run_dir": str(tmp_path / "run")})
    resolve.save(config, tmp_path / "run/config.yaml")
    mended = continued(compose, tmp_path / "run", f"adapter.source={second}")
    assert (mended.adapter.r, mended.adapter.targets, mended.adapter.source) == (4, ["k_proj"], str(second))


@pytest.mark.parametrize("word", ["experiment=llama8b_fsdp", "name=other", "run_dir=/elsewhere"])
def test_keys_of_the_folder_never_change(compose: Compose, run: Path, word: str) -> None:
    with pytest.raises(RunError, match="cannot change when a run is resumed") as caught:
        continued(compose, run, word)
    assert str(caught.value).startswith(word.split("=")[0] + ":")


def test_only_what_depends_on_a_changed_key_is_made_again(compose: Compose, run: Path) -> None:
    stored = resolve.load(run / "config.yaml")
    for name in ("data", "model"):
        (run / name).mkdir()
        (run / name / "file").write_text("x")
    assert resume.remove_what_changed(stored, put(continued(compose, run), {"train.steps": 9})) == []
    assert resume.remove_what_changed(stored, put(continued(compose, run), {"data.seed": 9})) == ["data"]
    assert [path.name for path in run.iterdir() if path.is_dir()] == ["model"]


def test_all_keys_that_may_not_change_are_reported(compose: Compose, run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(RunError) as caught:
        continued(compose, run, "train.seed=7", "train.steps=7", "data.seed=7")
    assert [str(problem).split(":")[0] for problem in caught.value.problems] == ["train.seed", "data.seed"]


def test_overrides_of_hydra_change_nothing(compose: Compose, run: Path) -> None:
    assert continued(compose, run, "hydra.verbose=true")


def test_every_changeable_key_exists() -> None:
    assert set(resume.CHANGEABLE) <= set(resolve.keys()) | set(groups(ROOT / "conf"))


@pytest.mark.parametrize("name", ["nowhere", "file", "empty"])
def test_a_folder_without_a_run_is_refused(compose: Compose, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=f"^resume={tmp_path}/{name}: is not a run folder: it has no config.yaml."):
        continued(compose, tmp_path / name)


def test_a_folder_of_the_same_run_can_be_used_again(compose: Compose) -> None:
    resume.require_same(compose(*BASE), put(compose(*BASE), {"dry_run": True}))


def test_a_folder_of_another_run_is_refused_with_what_differs(compose: Compose) -> None:
    asked = put(compose(*BASE), {"train.learning_rate": 0.5, "cluster.train.nodes": 7})
    with pytest.raises(RunError) as caught:
        resume.require_same(compose(*BASE), asked)
    message = str(caught.value)
    assert message.startswith("run_dir=/runs/golden: already holds a run with ")
    assert "train.learning_rate=1e-05 (now 0.5), cluster.train.nodes=4 (now 7)." in message
    assert "Use another run_dir, or continue that run: muster resume /runs/golden" in message


def test_only_the_first_of_many_differences_are_named(compose: Compose) -> None:
    asked = put(compose(*BASE), {f"train.{name}": 7 for name in ("seed", "steps", "beta1", "beta2", "eps")})
    put(asked, {"data.seed": 7, "data.max_rows": 7})
    with pytest.raises(RunError, match=r"and 2 more\. Use another run_dir") as caught:
        resume.require_same(compose(*BASE), asked)
    assert str(caught.value).count("(now 7)") == 5


@pytest.mark.parametrize(("before", "now"), [("llama8b", "hub"), ("hub", "llama8b")])
def test_a_section_that_only_one_has_is_a_difference(compose: Compose, before: str, now: str) -> None:
    configs = [compose(f"model={name}", "model.source=owner/name", "name=same") for name in (before, now)]
    with pytest.raises(RunError, match=r"model\.architecture\.hidden_size="):
        resume.require_same(*configs)


def end(config: Config, job: str, status: str, *, digest: str | None = None) -> None:
    """Record one more attempt of a job with `status`; `digest` is that of this config if None."""
    folder = Path(config.run_dir) / "jobs" / job
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUSTER_CONFIG", digest or resolve.digest(config))
        number = int(attempt.begin(folder)[0]["MUSTER_ATTEMPT"])
    attempt.record_end(folder, number, 0, status)
    attempt.finish(folder, number, 0, 1)


@pytest.mark.parametrize(
    ("attempts", "done"),
    [
        ([("completed", None)], True),
        ([("failed", None), ("preempted", None), ("completed", None)], True),
        ([("completed", None), ("failed", None)], False),
        ([("preempted", None)], False),
        ([("completed", "0000000000000000")], False),
        ([], False),
    ],
    ids=["completed", "completed at last", "failed since", "preempted", "another config", "never begun"],
)
def test_a_job_is_done_when_its_newest_attempt_completed_under_this_config(
    compose: Compose, tmp_path: Path, attempts: list[tuple[str, str | None]], done: bool
) -> None:
    config = put(compose(*BASE), {"run_dir": str(tmp_path)})
    for status, digest in attempts:
        end(config, "preprocess", status, digest=digest)
    assert resume.completed_jobs(config) == ({"preprocess"} if done else set())


def test_a_job_whose_newest_attempt_is_running_is_not_done(compose: Compose, tmp_path: Path) -> None:
    config = put(compose(*BASE), {"run_dir": str(tmp_path)})
    end(config, "preprocess", "completed")
    attempt.begin(tmp_path / "jobs/preprocess")
    assert resume.completed_jobs(config) == set()


def test_only_requested_jobs_count_as_done(compose: Compose, tmp_path: Path) -> None:
    config = put(compose(*BASE), {"run_dir": str(tmp_path)})
    end(config, "preprocess", "completed")
    assert resume.completed_jobs(put(config, {"jobs": ["train"]})) == set()


def test_training_from_a_chosen_checkpoint_is_never_done(compose: Compose, tmp_path: Path) -> None:
    config = put(compose(*BASE), {"run_dir": str(tmp_path)})
    for job in ("preprocess", "train"):
        end(config, job, "completed")
    assert resume.completed_jobs(put(config, {"train.resume_step": 5})) == {"preprocess"}


@pytest.mark.parametrize(
    ("changed", "is_kept"),
    [
        ({"train.learning_rate": 1e-5}, True),
        ({"sweep.stop_worst": None}, True),  # the others still compare themselves with it
        ({"sweep.stop_worst": "0.7@25%"}, True),
        ({"sweep.stop_worst": "0.5@50%"}, False),
        ({"train.steps": 80}, False),
        ({"train.resume_step": 5}, False),
    ],
)
def test_a_loss_at_another_step_of_a_sweep_is_forgotten(
    compose: Compose, tmp_path: Path, changed: dict[str, object], is_kept: bool
) -> None:
    values = {"run_dir": str(tmp_path), "train.steps": 40, "sweep.stop_worst": "0.5@25%"}
    (tmp_path / "rung.json").write_text("{}")
    resume.forget_comparison(put(compose(), values), put(compose(), values | changed))
    assert (tmp_path / "rung.json").exists() == is_kept
