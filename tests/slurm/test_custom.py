"""Training programs of users on a real Slurm: two nodes, told to stop once, requeued, resumed and merged."""

import re
from pathlib import Path

import pytest

from launcher import slurm as commands
from launcher.run_folder import attempts
from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = runs.damaged_model(tmp_path_factory.mktemp("model") / "tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def start(run: Path, model: Path, launcher: str, command: str, *overrides: str) -> None:
    words = f"{command} --model {model} --steps 60 --save-every 5"
    done = runs.launch(
        f"run_dir={run}", "pipeline=custom", "model=hub", f"model.source={model}", f"custom.launcher={launcher}",
        f'custom.command="{words}"', "cluster.signal_s=60", *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def saved(run: Path) -> int:
    return attempts.newest_checkpoint(run / "jobs/custom") or 0


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_torch_program_is_preempted_resumed_and_merged(
    slurm: Cluster, model: Path, tmp_path: Path, launcher: str
) -> None:
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    start(run, model, launcher, f"python {runs.CLONE}/examples/custom/torch_train.py")
    runs.wait_until(lambda: saved(run) >= 5)
    commands.call("scancel", "--signal=USR2", runs.job_id(run, "custom"))
    states = runs.finish(run)
    first, second = attempts.verdicts(run / "jobs/custom")
    assert (first["status"], first["requeued"]) == ("preempted", True), first
    assert first["saved"] >= 5
    assert second["status"] == "completed", second
    assert (second["resumed"], second["saved"]) == (first["saved"], 60)
    assert sorted(runs.logs(run, "custom")) == [0, 1, 2, 3]
    assert re.search(rf"resumed at step {first['saved']}\n(.*\n)*step 60 loss", runs.logs(run, "custom")[0])
    verdict = states["consolidate"].verdict
    assert verdict, states
    assert verdict["status"] == "completed", verdict
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert '"verified": true' in (run / "model/muster.json").read_text()
