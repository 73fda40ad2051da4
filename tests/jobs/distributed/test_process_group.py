"""jobs/distributed/process_group.py: the GPU of a rank, for what Slurm lets it see."""

import pytest
import torch

from conf.errors import SiteError
from jobs.distributed import process_group
from tests.conftest import Compose


@pytest.mark.parametrize(
    ("visible", "local_rank", "expected"),
    [(8, 0, 0), (8, 5, 5), (1, 0, 0), (1, 3, 0)],
    ids=["first", "sixth", "only", "bound"],
)
@pytest.mark.site(
    case="`--gpus-per-task=1` or `--gpu-bind`: each rank sees one GPU", before="refused: 1 GPU", after="it is device 0"
)
def test_a_rank_uses_its_own_gpu(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert process_group._device(compose("cluster=slurm"), local_rank) == torch.device("cuda", expected)


@pytest.mark.parametrize("visible", [0, 2, 4])
def test_too_few_gpus_are_refused_with_a_remedy(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, visible: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    with pytest.raises(SiteError, match=r"cluster\.srun_args=\[--gpu-bind=none\]"):
        process_group._device(compose("cluster=slurm"), 4)
