"""`parallel.deepspeed`: DeepSpeed gets these settings, and they change neither the training nor what is saved of it."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.choices import Backend
from conf.resolve import flat
from conf.schema import Config
from jobs import backends
from jobs.data import batches
from jobs.distributed.process_group import process_group
from jobs.model import build
from jobs.training import loss
from tests.conftest import Compose, put
from tests.jobs.networks import rows
from tests.jobs.ranks import spawn

SMALL = [
    "cluster.train.ranks_per_node=2", "train.global_batch=4", "train.micro_batch=2", "train.precision=fp32",
    "cluster.train.gpus_per_node=0", "train.learning_rate=1e-2",
]  # fmt: skip
BOTH = {"reduce_bucket_size": 5e4, "overlap_comm": False, "reduce_scatter": False}
STAGE_2 = BOTH | {"allgather_bucket_size": 4e4, "allgather_partitions": False, "use_multi_rank_bucket_allreduce": False,
                  "ignore_unused_parameters": False, "contiguous_gradients": False}  # fmt: skip
STAGE_3 = BOTH | {
    "sub_group_size": 3e4,
    "stage3_prefetch_bucket_size": 1e4,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 1e6,
    "stage3_max_live_parameters": 2e4,
    "stage3_max_reuse_distance": 1e4,
    "contiguous_gradients": False,
    "stage3_gather_16bit_weights_on_model_save": True,
    "stage3_module_granularity_threshold": 0,
    "stage3_allgather_sequential": True,
    "memory_efficient_linear": False,
    "enable_sanity_checks": True,
    "log_trace_cache_warnings": True,
}
pytestmark = pytest.mark.filterwarnings("ignore")


def trained(engine: backends.Engine, backend: backends.Backend, rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after three steps, of which one was saved and loaded between."""
    samples = rows([24] * 12)
    for step in range(3):
        batch = batches.collate(samples, np.arange(2) + 4 * step + 2 * rank, pad=0)
        backend.backward(engine, loss.summed_cross_entropy(engine.module, batch) / 20, last=True)
        backend.step(engine, 1e-2)
        if step == 1:
            backend.save(engine, folder)
            backend.load(engine, folder)
    return dict(backend.weights(engine))


def _equal(rank: int, config: Config, settings: dict[str, Any], folder: Path) -> None:
    backend, results = backends.import_backend(config), []
    with process_group(config) as world:
        for number, mine in enumerate(({}, settings)):
            changed = put(deepcopy(config), {"parallel.deepspeed": {"zero_optimization": mine}})
            engine = backend.wrap(build.build_on_meta(changed), changed, world)
            passed = engine.module.config["zero_optimization"]
            assert {name: passed[name] for name in mine} == mine
            results.append(trained(engine, backend, rank, folder / str(number)))
        plain, tuned = results
        assert set(plain) == set(tuned)
        for name, weight in plain.items():
            torch.testing.assert_close(tuned[name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [pytest.param(2, STAGE_2, id="zero2", marks=pytest.mark.proof), pytest.param(3, STAGE_3, id="zero3")],
)
def test_settings_reach_deepspeed_and_train_the_same(stage, settings, compose: Compose, tmp_path: Path) -> None:
    config = put(compose("model=tiny", *SMALL), {"parallel.backend": Backend.zero, "parallel.zero_stage": stage})
    assert len(flat(settings)) == len(settings)
    spawn(_equal, 2, config, settings, tmp_path)
