"""Each layout really shards its parameters: checked on the tensors of four ranks, not inferred from a loss."""

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from conf.schema import Config
from jobs import backends
from jobs.distributed.process_group import process_group
from jobs.model import build
from tests.jobs.ranks import spawn

WORLD = 4


def _fsdp(_rank: int, layouts: list[tuple[Config, tuple[int, ...], tuple[object, ...], int]]) -> None:
    with process_group(layouts[0][0]) as world:
        for config, shape, placements, share in layouts:
            engine = backends.import_backend(config).wrap(build.build(config), config, world)
            for name, parameter in engine.module.named_parameters():
                label = f"{config.parallel.name}: {name}"
                assert isinstance(parameter, DTensor), label
                assert tuple(parameter.device_mesh.shape) == shape, label
                assert parameter.placements == placements, label
                assert parameter.to_local().shape[0] == parameter.shape[0] // share, label


def test_fsdp_parameters_are_dtensors_on_the_mesh(compose) -> None:
    words = ["cluster.train.ranks_per_node=4", "cluster.train.gpus_per_node=0"]
    layouts = [
        (compose("parallel=fsdp", *words), (4,), (Shard(0),), 4),
        (compose("parallel=hsdp", "parallel.shard_ranks=2", *words), (2, 2), (Replicate(), Shard(0)), 2),
        (compose("parallel=ddp", *words), (4, 1), (Replicate(), Shard(0)), 1),
    ]
    spawn(_fsdp, WORLD, layouts)


def _zero(_rank: int, configs: list[Config]) -> None:
    with process_group(configs[0]) as world:
        for config in configs:
            engine = backends.import_backend(config).wrap(build.build(config), config, world)
            network = engine.module.module
            rotary = dict(network.named_buffers())["model.rotary_emb.inv_freq"]
            assert (
                rotary.dtype is torch.float32
            )  # in bf16 the angles of far positions would be wrong by a tenth of a turn
            assert {parameter.dtype for parameter in network.parameters()} == {build.compute_dtype(config)}
            if config.parallel.zero_stage == 3:
                for name, parameter in network.named_parameters():
                    if not parameter.ds_persist:
                        assert parameter.numel() == 0, name
                    assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // WORLD), name
            else:
                masters = engine.optimizer.single_partition_of_fp32_groups
                total = sum(parameter.numel() for parameter in network.parameters())
                own = sum(part.numel() for part in masters)
                assert total / WORLD <= own < total / WORLD + 4 * WORLD * len(masters)
                assert engine.optimizer.partition_gradients == (config.parallel.zero_stage == 2)


def test_zero_partitions_what_its_stage_requires(compose) -> None:
    asked = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")]
    words = "cluster.train.ranks_per_node=4"
    spawn(_zero, WORLD, [compose(f"parallel=zero{stage}", words, f"train.precision={kind}") for stage, kind in asked])
