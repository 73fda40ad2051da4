"""launcher/plan.py: the jobs of a run, their resources and their order."""

import pytest

from conf.jobs import JOB_KINDS
from launcher.plan import Job, plan
from tests.conftest import Compose, put

ALL = [name for name in JOB_KINDS if name != "custom"]  # a run has `train` or `custom`


@pytest.mark.parametrize(
    ("jobs", "done", "edges"),
    [
        (
            ALL,
            [],
            {
                "fetch": (),
                "preflight": (),
                "preprocess": ("fetch",),
                "train": ("fetch", "preflight", "preprocess"),
                "consolidate": ("train",),
                "evaluate": ("preprocess", "consolidate"),
                "generate": ("consolidate",),
                "push": ("consolidate",),
            },
        ),
        (["train", "preprocess"], [], {"preprocess": (), "train": ("preprocess",)}),
        (["train"], [], {"train": ()}),
        (["consolidate", "evaluate"], [], {"consolidate": (), "evaluate": ("consolidate",)}),
        (["preprocess", "train", "consolidate"], ["preprocess"], {"train": (), "consolidate": ("train",)}),
        (["preprocess", "train"], ["preprocess", "train"], {}),
        (["generate"], ["train"], {"generate": ()}),
    ],
    ids=["all", "any order", "train alone", "no train", "preprocess done", "all done", "others done"],
)
def test_a_job_waits_for_its_inputs_that_are_not_done(
    compose: Compose, jobs: list[str], done: list[str], edges: dict[str, tuple[str, ...]]
) -> None:
    planned = plan(put(compose("cluster=slurm"), {"jobs": jobs}), done=done)
    assert [(job.name, job.after) for job in planned] == list(edges.items())


def test_jobs_are_planned_after_their_inputs(compose: Compose) -> None:
    names = [job.name for job in plan(put(compose(), {"jobs": ALL[::-1]}))]
    assert names == ["fetch", "preflight", "preprocess", "train", "consolidate", "evaluate", "generate", "push"]


@pytest.mark.parametrize(
    ("section", "jobs"),
    [
        ("train", ["preflight", "train"]),
        ("cpu", ["fetch", "preprocess", "consolidate", "push"]),
        ("inference", ["evaluate", "generate"]),
    ],
)
def test_resources_come_from_the_section_of_the_job(compose: Compose, section: str, jobs: list[str]) -> None:
    config = put(compose("cluster=slurm"), {"jobs": ALL})
    own = getattr(config.cluster, section)
    assert [job.name for job in plan(config) if job.resources is own] == jobs


def test_consolidate_uses_all_ranks_and_preprocess_one(compose: Compose) -> None:
    config = put(compose("cluster=slurm"), {"jobs": ALL, "cluster.cpu.nodes": 3, "cluster.cpu.ranks_per_node": 2})
    sizes = {job.name: job.world_size for job in plan(config)}
    assert (sizes["preprocess"], sizes["consolidate"]) == (1, 6)


def test_cpu_jobs_get_no_gpus(compose: Compose) -> None:
    config = put(compose("cluster=slurm"), {"jobs": ALL})
    with_gpus = {job.name for job in plan(config) if job.resources.gpus_per_node}
    assert with_gpus == {"preflight", "train", "evaluate", "generate"}


def test_only_jobs_of_many_ranks_need_a_rendezvous(compose: Compose) -> None:
    jobs = plan(put(compose("cluster=slurm"), {"jobs": ALL, "cluster.train.nodes": 3}))
    assert {job.name: job.world_size for job in jobs if job.distributed} == {"preflight": 24, "train": 24}
    assert {job.world_size for job in jobs if not job.distributed} == {1}


def test_a_job_is_distributed_also_with_one_rank(compose: Compose) -> None:
    part = put(compose(), {"cluster.train.ranks_per_node": 1}).cluster.train
    assert Job("train", part).distributed
    assert Job("train", part).world_size == 1


def test_a_completed_job_runs_again_if_its_input_does(compose: Compose) -> None:
    names = [job.name for job in plan(compose(), done={"preprocess", "consolidate"})]
    assert names == ["train", "consolidate", "evaluate", "generate"]


@pytest.mark.parametrize(("launcher", "ranks", "cpus"), [("srun", 8, 12), ("torchrun", 1, 96)])
def test_a_program_of_the_user_has_one_task_per_rank_or_per_node(
    compose: Compose, launcher: str, ranks: int, cpus: int
) -> None:
    custom, consolidate = plan(compose("cluster=slurm", "pipeline=custom", f"custom.launcher={launcher}"))
    assert (custom.name, custom.resources.ranks_per_node, custom.resources.cpus_per_rank) == ("custom", ranks, cpus)
    assert custom.resources.gpus_per_node == 8
    assert consolidate.after == ("custom",)
