"""A checkpoint of one layout is loaded into another, on other ranks: master weights and optimizer state are equal bit for bit."""

import pytest
import torch

from conf.choices import Backend
from conf.errors import RunError
from conf.schema import Config
from jobs import backends
from jobs.checkpoint import checkpointing, reshard
from jobs.distributed.process_group import process_group
from jobs.model import build
from jobs.tensor_io.dtypes import as_bytes
from jobs.tensor_io.reader import OpenFiles, Reader
from tests.jobs.checkpoints import save
from tests.jobs.ranks import spawn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WORDS = [
    "cluster.train.gpus_per_node=0",
    "cluster.train.ranks_per_node=2",
    "train.global_batch=24",
    "train.weight_decay=0.1",
]
LAYOUTS = ("fsdp", "zero1", "zero2", "zero3")


def loss(engine):
    torch.manual_seed(1)
    tokens = torch.randint(3, 100, (2, 16))
    return engine.module(input_ids=tokens, labels=tokens).loss


def write(rank: int, configs: list[Config]) -> None:
    """Update twice with each layout, save its checkpoint, and write the loss after the updates beside it."""
    with process_group(configs[0]) as world:
        for config in configs:
            backend = backends.import_backend(config)
            engine = backend.wrap(build.build(config), config, world)
            for _ in range(2):
                backend.backward(engine, loss(engine), last=True)
                backend.step(engine, 1e-2)
            info = checkpointing.layout(config, world)
            path = save(config, 2, world, lambda folder: backend.save(engine, folder), info)  # noqa: B023
            after = loss(engine).item()
            if rank == 0:
                torch.save(after, path.parent / "loss")


def read(rank: int, moves: dict[str, tuple[Config, list[Config]]]) -> None:
    """Each target loads its source's checkpoint, and saves the state in its own layout."""
    with process_group(next(iter(moves.values()))[0]) as world:
        for source, config in [(source, config) for source, configs in moves.values() for config in configs]:
            backend = backends.import_backend(config)
            engine = backend.wrap(build.build_on_meta(config), config, world, resumed=True)
            path, _ = checkpointing.select_for_consolidation(source)
            reshard.load(backend, engine, path, source.parallel.backend)
            assert loss(engine).item() == pytest.approx(torch.load(path.parent / "loss"), rel=1e-4)
            info = checkpointing.layout(config, world)
            save(config, 2, world, lambda folder: backend.save(engine, folder), info)  # noqa: B023


def whole(config: Config) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint; the key is 'weight kind'."""
    path, _ = checkpointing.select_for_consolidation(config)
    files, tensors = OpenFiles(), {}
    for name, kinds in reshard.stored(path, config.parallel.backend).items():
        for kind, tensor in kinds.items():
            value = torch.empty(tensor.numel, dtype=tensor.dtype.torch)
            Reader(files).fill(tensor, 0, as_bytes(value))
            tensors[f"{name} {kind}"] = value.view(tensor.shape)
    files.close()
    return tensors


def check(moves: dict[str, tuple[Config, list[Config]]], ranks: int) -> None:
    spawn(read, ranks, moves)
    for source, configs in moves.values():
        expected = whole(source)
        assert {key.split()[1] for key in expected} == {"weight", "exp_avg", "exp_avg_sq", "step"}
        assert all(value.item() == 2 for key, value in expected.items() if key.endswith(" step"))
        for config in configs:
            found = whole(config)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(found[key], value), (source.parallel.name, config.parallel.name, ranks, key)


def targets(compose, folder, names, *words):
    return [compose(f"run_dir={folder}/{name}", f"parallel={name}", *WORDS, *words) for name in names]


def test_a_checkpoint_of_four_ranks_is_loaded_on_two_in_either_layout(compose, tmp_path) -> None:
    sources = targets(compose, tmp_path / "from", ["zero3", "fsdp"])
    spawn(write, 4, sources)
    goals = {"zero3": ["zero3", "fsdp"], "fsdp": ["zero3"]}
    to = {name: targets(compose, tmp_path / f"of-{name}", goals[name]) for name in goals}
    check({name: (source, to[name]) for name, source in zip(goals, sources, strict=True)}, 2)


@pytest.mark.proof
@pytest.mark.parametrize("words", [[], ["adapter=lora"], ["train.precision=bf16"]], ids=["full", "lora", "bf16"])
def test_every_layout_into_every_other_on_fewer_and_more_ranks(words, compose, tmp_path) -> None:
    sources = targets(compose, tmp_path / "from", LAYOUTS, *words)
    spawn(write, 4, sources)
    for number in (1, 2, 3, 6):
        to = {name: targets(compose, tmp_path / f"{name}-{number}", LAYOUTS, *words) for name in LAYOUTS}
        check({name: (source, to[name]) for name, source in zip(LAYOUTS, sources, strict=True)}, number)


def different_adapter(rank: int, source: Config, config: Config) -> None:
    with process_group(config) as world:
        backend = backends.import_backend(config)
        engine = backend.wrap(build.build_on_meta(config), config, world, resumed=True)
        with pytest.raises(RunError, match=r"lora_A.* is missing: resume with the layout that wrote it"):
            reshard.load(backend, engine, checkpointing.select_for_consolidation(source)[0], Backend.zero)


@pytest.mark.proof
def test_a_missing_tensor_is_named_on_all_ranks(compose, tmp_path) -> None:
    source = targets(compose, tmp_path / "from", ["zero3"])
    spawn(write, 2, source)
    spawn(different_adapter, 2, source[0], *targets(compose, tmp_path / "to", ["fsdp"], "adapter=lora"))
