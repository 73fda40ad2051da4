"""conf/mesh.py: pictures of layouts on nodes, small and large."""

import pytest

from conf import mesh
from conf.choices import Backend
from conf.schema_training import Parallel
from tests.conftest import Compose, Launch


def fsdp(name: str = "fsdp", shard: int | None = None, tensor_ranks: int = 1, context_ranks: int = 1) -> Parallel:
    return Parallel(
        name=name, backend=Backend.fsdp, shard_ranks=shard, tensor_ranks=tensor_ranks, context_ranks=context_ranks
    )


PICTURES = {
    "fsdp": (fsdp(), 2, 4, """\
mesh      fsdp: 8 ranks on 2 nodes; each rank holds 1/8 of parameters, gradients and optimizer state
          node 0  | 0 1 2 3
          node 1    4 5 6 7 |"""),
    "hsdp": (fsdp("hsdp", 4), 2, 4, """\
mesh      hsdp: 8 ranks on 2 nodes; 2 copies; each rank holds 1/4 of parameters, gradients and optimizer state
          node 0  | 0 1 2 3 |
          node 1  | 4 5 6 7 |
          |: one copy; ranks 0 4 hold the same part of it, and average its gradients"""),
    "two copies a node": (fsdp("hsdp", 2), 1, 4, """\
mesh      hsdp: 4 ranks on 1 node; 2 copies; each rank holds 1/2 of parameters, gradients and optimizer state
          node 0  | 0 1 | 2 3 |
          |: one copy; ranks 0 2 hold the same part of it, and average its gradients"""),
    "copies that span nodes": (fsdp("hsdp", 6), 3, 4, """\
mesh      hsdp: 12 ranks on 3 nodes; 2 copies; each rank holds 1/6 of parameters, gradients and optimizer state
          node 0  |  0  1  2  3
          node 1     4  5 |  6  7
          node 2     8  9 10 11 |
          |: one copy; ranks 0 6 hold the same part of it, and average its gradients"""),
    "ddp": (fsdp("ddp", 1), 1, 2, """\
mesh      ddp: 2 ranks on 1 node; each rank holds the whole model, and gradients are averaged over all
          node 0  | 0 | 1 |"""),
    "zero1": (Parallel("zero1", Backend.zero, zero_stage=1), 1, 2, """\
mesh      zero1: 2 ranks on 1 node; each rank holds the whole model, and 1/2 of optimizer state
          node 0  | 0 1 |"""),
    "tensor and context parallelism": (fsdp(tensor_ranks=2, context_ranks=2), 1, 8, """\
mesh      fsdp: 8 ranks on 1 node; each rank holds 1/8 of parameters, gradients and optimizer state
          node 0  | 0+1~2+3 4+5~6+7 |
          +: these ranks share each matrix of a block
          ~: these ranks share the tokens of a row"""),
    "64 nodes": (fsdp("hsdp", 8), 64, 8, """\
mesh      hsdp: 512 ranks on 64 nodes; 64 copies; each rank holds 1/8 of parameters, gradients and optimizer state
          node 0   |   0   1   2   3   4   5   6   7 |
          node 1   |   8   9  10  11  12  13  14  15 |
          node 2   |  16  17  18  19  20  21  22  23 |
          node 3   |  24  25  26  27  28  29  30  31 |
          ... 59 more nodes ...
          node 63  | 504 505 506 507 508 509 510 511 |
          |: one copy; ranks 0 8 16 24 ... hold the same part of it, and average its gradients"""),
    "many ranks on a node": (fsdp(), 1, 32, """\
mesh      fsdp: 32 ranks on 1 node; each rank holds 1/32 of parameters, gradients and optimizer state
          node 0  |  0  1  2  3  4  5  6  7 ... 31 |"""),
}  # fmt: skip


@pytest.mark.parametrize("case", PICTURES)
def test_a_layout_is_drawn(case: str) -> None:
    parallel, nodes, ranks, drawn = PICTURES[case]
    assert "\n".join(mesh.picture(parallel, nodes, ranks)) == drawn


def test_known_host_names_are_shown() -> None:
    lines = mesh.picture(fsdp(), 2, 2, ["gpu-a", "gpu-bcd"])
    assert lines[1:] == ["          gpu-a    | 0 1", "          gpu-bcd    2 3 |"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp", "fsdp_offload", "zero1", "zero2", "zero3", "zero3_offload"])
def test_every_layout_has_a_picture_that_fits_a_terminal(compose: Compose, layout: str) -> None:
    config = compose("cluster=slurm", f"parallel={layout}")
    lines = mesh.picture(config.parallel, 64, 8)
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 132


def test_a_launch_shows_the_picture(launch: Launch) -> None:
    shown = launch("cluster=slurm", "parallel=hsdp", "dry_run=true")
    assert "          node 3  | 24 25 26 27 28 29 30 31 |" in shown.stdout.splitlines(), shown.stderr
