"""The job `push` with the real huggingface_hub, against a Hub on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conf import resolve
from launcher import plan
from tests.conftest import ROOT, Compose, put, python
from tests.hub_server import Hub, account

WEIGHTS = os.urandom(4096)


@pytest.fixture
def run(tmp_path: Path, compose: Compose) -> Path:
    """A run with a model of two files and a card."""
    folder = tmp_path / "run"
    write_model(folder, {"model.safetensors": WEIGHTS, "README.md": b"---\nlibrary_name: transformers\n---\n# Mine\n"})
    resolve.save(put(compose(), {"run_dir": str(folder), "hub.push": "me/mine"}), folder / "config.yaml")
    return folder


def write_model(run: Path, files: dict[str, bytes], verified: bool = True) -> None:
    (run / "model").mkdir(parents=True, exist_ok=True)
    for name, content in {**files, "config.json": b"{}"}.items():
        (run / "model" / name).write_bytes(content)
    (run / "model/muster.json").write_text(json.dumps({"digest": sorted(files), "verified": verified}))


def push(run: Path, value: str | None = "hf_w", **hub_keys: object) -> "subprocess.CompletedProcess[str]":
    config = resolve.load(run / "config.yaml")
    path = run / "jobs/push/config.yaml"
    resolve.save(put(config, {f"hub.{key}": value for key, value in hub_keys.items()}), path)
    env = {**os.environ, "HF_HOME": str(run / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"HF_TOKEN": value} if value else {}
    command = [sys.executable, "-m", "jobs", "push", str(path)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def pushed(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    return hub.repositories["model", "me/mine"].at(branch)[1]


def test_the_model_and_its_card_are_in_a_private_repository(run: Path, hub: Hub) -> None:
    hub.tokens["hf_w"] = account("me")
    done = push(run, tag="v1")
    assert done.returncode == 0, done.stderr
    here = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert pushed(hub) == here | {".gitattributes": b""} == pushed(hub, "v1")
    repository = hub.repositories["model", "me/mine"]
    assert repository.private
    record = json.loads((run / "hub.json").read_text())
    assert record["commit"] == repository.refs["main"]
    assert record["url"] == f"{hub.endpoint}/me/mine/tree/{record['commit']}" in done.stdout + done.stderr

    assert push(run, tag="v1").returncode == 0  # nothing new: the card may have been edited there
    assert len(repository.commits) == 2
    del hub.repositories["model", "me/mine"]
    assert push(run, tag="v1").returncode == 0  # somebody deleted the repository
    assert pushed(hub) == here | {".gitattributes": b""}


def test_files_of_an_earlier_model_are_deleted(run: Path, hub: Hub) -> None:
    """transformers would load the old model.safetensors rather than the new shards."""
    hub.tokens["hf_w"] = account("me")
    assert push(run).returncode == 0
    (run / "model/model.safetensors").unlink()
    write_model(run, {"model-00001-of-00001.safetensors": WEIGHTS[:99], "model.safetensors.index.json": b"{}"})
    (run / "model/notes.txt").write_text("kept")
    assert push(run, revision="next").returncode == 0
    assert "model.safetensors" in pushed(hub) and "model.safetensors" not in pushed(hub, "next")
    assert {"model-00001-of-00001.safetensors", "README.md", "notes.txt"} <= set(pushed(hub, "next"))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no model", "there is no model here that was merged and verified. Merge it first: muster merge"),
        ("not verified", "there is no model here that was merged and verified"),
        ("public", "hub.push=me/mine: everybody can read this repository, but hub.private=true. Push to another one, or set"),
        ("wrong token", "hub.push=me/mine: the Hub refuses: .*401.*Push it later: muster push"),
        ("other owner", "hub.push=me/mine: the Hub refuses: .*403.*Push it later: muster push"),
        ("named token", "hub.token=MY_TOKEN: this variable has no value in the job"),
    ],
)  # fmt: skip
def test_a_push_that_cannot_be_done_is_a_users_error(run: Path, hub: Hub, case: str, expected: str) -> None:
    hub.tokens["hf_w"] = account("you" if case == "other owner" else "me")
    if case == "no model":
        (run / "model/muster.json").unlink()
    if case == "not verified":
        write_model(run, {}, verified=False)
    if case == "public":
        hub.add("model", "me/mine", {})
    value = "hf_other" if case == "wrong token" else "hf_w"
    done = push(run, value, **({"token": "MY_TOKEN"} if case == "named token" else {}))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(expected, done.stderr), done.stderr
    assert (run / "model/model.safetensors").read_bytes() == WEIGHTS
    assert not (run / "hub.json").exists()


def test_an_upload_that_breaks_off_may_be_tried_again(run: Path, hub: Hub) -> None:
    """Not a user's error: Muster restarts such a job by itself."""
    hub.tokens["hf_w"] = account("me")
    hub.fails_after = 0
    done = push(run)
    assert done.returncode == 1
    assert "ConnectionError: hub.push=me/mine: the upload broke off: " in done.stderr
    assert done.stderr.rstrip().endswith(f"{run}/model is complete. Push it later: muster push {run}")
    hub.fails_after = None
    assert push(run).returncode == 0
    assert pushed(hub)["model.safetensors"] == WEIGHTS


def test_muster_push_works_on_this_machine_for_a_run_of_a_cluster(
    compose: Compose, hub: Hub, tmp_path: Path, surroundings: dict[str, str]
) -> None:
    """Also with cluster.offline, which holds for the compute nodes; there is no Slurm here."""
    hub.tokens["hf_w"] = account("me")
    run = tmp_path / "run"
    write_model(run, {"model.safetensors": WEIGHTS})
    config = compose("cluster=slurm", "cluster.train.nodes=2", "train.micro_batch=1", "cluster.offline=true")
    resolve.save(put(config, {"run_dir": str(run)}), run / "config.yaml")
    stored = (run / "config.yaml").read_text()

    def muster(*words: str, **env: str) -> "subprocess.CompletedProcess[str]":
        base = surroundings | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONWARNINGS": "default"}
        return python("-m", "launcher", "push", run, *words, cwd=ROOT, env=base | env)

    refused = muster("hub.push=me/mine")
    assert (refused.returncode, "there is no token to push with" in refused.stderr) == (2, True), refused.stderr
    assert "model.safetensors" not in str(hub.repositories)
    done = muster("hub.push=me/mine", HF_TOKEN="hf_w")
    assert done.returncode == 0, done.stdout + done.stderr
    assert pushed(hub)["model.safetensors"] == WEIGHTS
    assert f"pushed    {hub.endpoint}/me/mine/tree/" in done.stdout
    assert json.loads((run / "jobs/push/attempt-1.json").read_text())["status"] == "completed"
    assert (run / "config.yaml").read_text() == stored
    del hub.repositories["model", "me/mine"]
    hub.fails_after = 0
    (run / "model/model.safetensors").write_bytes(WEIGHTS[::-1])
    failed = muster("hub.push=me/mine", HF_TOKEN="hf_w")
    assert failed.returncode == 1
    assert f"muster push {run}" in failed.stderr
    verdict = json.loads((run / "jobs/push/attempt-2.json").read_text())
    assert verdict["status"] == "failed" and "the upload broke off" in verdict["reason"]


def test_a_run_that_consolidates_pushes_last(compose: Compose) -> None:
    config = put(compose("cluster=slurm", "model=llama8b"), {"hub.push": "me/mine"})
    plan.add_push(config)
    assert [(job.name, job.after) for job in plan.plan(config)][-1] == ("push", ("consolidate",))
    config = put(compose("cluster=slurm", "pipeline=train"), {"hub.push": "me/mine"})
    plan.add_push(config)
    assert "push" not in config.jobs
