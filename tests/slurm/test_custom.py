"""Training programs of users on a real Slurm: two nodes, preempted by Slurm, requeued, resumed and merged."""

import importlib.util
from pathlib import Path

import pytest

from tests.slurm import own_trainers, runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and rows."""
    return own_trainers.make_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_torch_program_is_preempted_resumed_and_merged(slurm: Cluster, inputs: Path, tmp_path: Path) -> None:
    result = own_trainers.check(tmp_path / "run", inputs, own_trainers.EXAMPLES[0])
    assert f"resumed at step {result['resumed']}\n" in runs.logs(tmp_path / "run", "custom")[0]


@pytest.mark.proof
@pytest.mark.parametrize(
    "example", own_trainers.EXAMPLES[1:], ids=lambda item: f"{item.script}-{item.launcher}-{item.layout}"
)
def test_every_example_is_preempted_resumed_and_merged(
    slurm: Cluster, inputs: Path, tmp_path: Path, example: own_trainers.Example
) -> None:
    needs = "trl" if example.data else "ray" if example.launcher == "ray" else "torch"
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}: make custom")
    own_trainers.check(tmp_path / "run", inputs, example)


def test_a_program_that_fails_on_one_rank_is_named(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os\nif os.environ['RANK'] == '2':\n    raise ValueError('no such column')\n"
    )
    command = f'custom.command="{tmp_path}/train.py"'
    runs.start(tmp_path / "run", "jobs=[custom]", "custom.launcher=torchrun", command, "cluster.requeue=false")
    verdict = runs.final_verdict(tmp_path / "run", "custom")
    assert (verdict["status"], verdict["rank"]) == ("failed", 2), verdict
    assert verdict["reason"].startswith("ValueError: no such column"), verdict
