"""launcher/check/cluster_wide.py: `cluster.gpus` and `cluster.partition` set the keys of the sections, and name conflicts."""

import pytest

from conf.errors import ConfigError, Problem
from conf.schema import Config
from launcher.check import cluster_wide
from tests.conftest import Compose, Launch


def apply(config: Config, *words: str) -> Config:
    """Apply the command line `words`, of `cluster.gpus` and `cluster.partition` only."""
    values = dict(word.split("=") for word in words)
    config.cluster.gpus = int(values["cluster.gpus"]) if "cluster.gpus" in values else None
    config.cluster.partition = values.get("cluster.partition")
    cluster_wide.apply(config, words)
    return config


@pytest.mark.parametrize(
    ("cluster", "gpus", "nodes", "per_node"),
    [("slurm", 8, 1, 8), ("slurm", 16, 2, 8), ("slurm", 2, 1, 2), ("local", 1, 1, 1), ("local", 4, 1, 4)],
)
def test_gpus_are_spread_over_nodes(compose: Compose, cluster: str, gpus: int, nodes: int, per_node: int) -> None:
    config = apply(compose(f"cluster={cluster}"), f"cluster.gpus={gpus}")
    train = config.cluster.train
    assert (train.nodes, train.ranks_per_node, train.gpus_per_node) == (nodes, per_node, per_node)
    assert cluster_wide.take(config) == (gpus, None)
    assert config.cluster.gpus is None  # so that a resumed run may set these keys one by one


def test_no_gpus_on_this_machine_are_the_cpu(compose: Compose) -> None:
    train = apply(compose("cluster=local", gpus=8), "cluster.gpus=0").cluster.train
    assert (train.ranks_per_node, train.gpus_per_node) == (2, 0)


def test_a_partition_is_that_of_all_jobs(compose: Compose) -> None:
    cluster = apply(compose("cluster=slurm"), "cluster.partition=gpu").cluster
    assert [cluster.train.partition, cluster.cpu.partition, cluster.inference.partition] == ["gpu"] * 3


@pytest.mark.parametrize(
    ("cluster", "words", "message"),
    [
        ("slurm", ["cluster.gpus=12"], "cluster.gpus=12: does not fill nodes of 8 GPUs .* Use 8 or 16"),
        ("slurm", ["cluster.gpus=0"], "cluster.gpus=0: only cluster=local"),
        ("slurm", ["cluster.gpus=-8"], "cluster.gpus=-8: must be at least 0"),
        ("slurm", ["cluster.gpus=8", "cluster.train.nodes=2"], "cluster.train.nodes=2: cluster.gpus=8 sets it"),
        ("local", ["cluster.partition=gpu"], "cluster.partition=gpu: has no effect"),
    ],
)
def test_conflicts_are_named(compose: Compose, cluster: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply(compose(f"cluster={cluster}"), *words)


def test_a_partition_of_one_section_is_not_replaced_in_silence(compose: Compose) -> None:
    config = compose("cluster=slurm")
    config.cluster.cpu.partition = "cpu"
    with pytest.raises(ConfigError, match=r"cluster.cpu.partition=cpu: cluster.partition=gpu sets it too"):
        apply(config, "cluster.partition=gpu")


GIVEN = cluster_wide.Given(16, "gpu")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (("cluster.train.nodes", 2, "too few"), "cluster.gpus=16: too few"),
        (("train.tf32", True, "but cluster.train.gpus_per_node=0"), "train.tf32=true: but cluster.gpus=0"),
        (("train.global_batch", 4, "Use cluster.train.nodes=4"), "train.global_batch=4: Use cluster.gpus=32"),
        (
            ("parallel.tensor_ranks", 3, "must divide cluster.train.ranks_per_node=8"),
            "parallel.tensor_ranks=3: must divide cluster.train.ranks_per_node=8 (from cluster.gpus=16)",
        ),
        (("cluster.cpu.partition", "x", "Set cluster.cpu.partition"), "cluster.partition=gpu: Set cluster.partition"),
        (("cluster.train.time_min", 1, "Raise it"), "cluster.train.time_min=1: Raise it"),
    ],
)
def test_a_problem_gets_the_keys_that_were_set(problem: tuple[str, object, str], expected: str) -> None:
    [renamed] = cluster_wide.as_given([Problem(*problem)] * 2, GIVEN, 8)
    assert str(renamed) == expected
    assert cluster_wide.as_given([Problem(*problem)], cluster_wide.Given(None, None), 8) == [Problem(*problem)]


def test_a_launch_names_the_key_that_was_typed(launch: Launch) -> None:
    shown = launch("cluster.gpus=2").stderr
    assert shown == "launch.py: cluster.gpus=2: this machine has 0 GPUs. Set cluster.gpus=0 to run on the CPU\n"
    assert launch("cluster.gpus=0", "dry_run=true").returncode == 0
