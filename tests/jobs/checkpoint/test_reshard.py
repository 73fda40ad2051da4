"""A checkpoint of one layout read into another, on other ranks: every master and every number of the optimizer, bit for bit."""

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
from jobs.tensor_io.reader import Files, Reader
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
    """Two updates by each layout, and its checkpoint; the loss after them beside it."""
    with process_group(configs[0]) as world:
        for config in configs:
            backend = backends.chosen(config)
            engine = backend.wrap(build.build(config), config, world)
            for _ in range(2):
                backend.backward(engine, loss(engine), last=True)
                backend.step(engine, 1e-2)
            about = checkpointing.layout(config, world)
            path = checkpointing.save(config, 2, world, lambda folder: backend.save(engine, folder), about)  # noqa: B023
            after = loss(engine).item()
            if rank == 0:
                torch.save(after, path.parent / "loss")


def read(rank: int, moves: dict[str, tuple[Config, list[Config]]]) -> None:
    """Each target takes over the state of its source's checkpoint, and writes it in its own layout."""
    with process_group(next(iter(moves.values()))[0]) as world:
        for source, config in [(source, config) for source, configs in moves.values() for config in configs]:
            backend = backends.chosen(config)
            engine = backend.wrap(build.build_on_meta(config), config, world, resumed=True)
            path, _ = checkpointing.to_merge(source)
            reshard.load(backend, engine, path, source.parallel.backend)
            assert loss(engine).item() == pytest.approx(torch.load(path.parent / "loss"), rel=1e-4)
            about = checkpointing.layout(config, world)
            checkpointing.save(config, 2, world, lambda folder: backend.save(engine, folder), about)  # noqa: B023


def whole(config: Config) -> dict[str, torch.Tensor]:
    """Every number of a checkpoint, by weight and kind."""
    path, _ = checkpointing.to_merge(config)
    files, found = Files(), {}
    for name, kinds in reshard.stored(path, config.parallel.backend).items():
        for kind, place in kinds.items():
            value = torch.empty(place.numel, dtype=place.dtype.torch)
            Reader(files).fill(place, 0, as_bytes(value))
            found[f"{name} {kind}"] = value.view(place.shape)
    files.close()
    return found


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


def test_what_four_ranks_wrote_goes_to_two_in_either_layout(compose, tmp_path):
    sources = targets(compose, tmp_path / "from", ["zero3", "fsdp"])
    spawn(write, 4, sources)
    goals = {"zero3": ["zero3", "fsdp"], "fsdp": ["zero3"]}
    to = {name: targets(compose, tmp_path / f"of-{name}", goals[name]) for name in goals}
    check({name: (source, to[name]) for name, source in zip(goals, sources, strict=True)}, 2)


@pytest.mark.proof
@pytest.mark.parametrize("words", [[], ["adapter=lora"], ["train.precision=bf16"]], ids=["full", "lora", "bf16"])
def test_every_layout_into_every_other_on_fewer_and_more_ranks(words, compose, tmp_path):
    sources = targets(compose, tmp_path / "from", LAYOUTS, *words)
    spawn(write, 4, sources)
    for number in (1, 2, 3, 6):
        to = {name: targets(compose, tmp_path / f"{name}-{number}", LAYOUTS, *words) for name in LAYOUTS}
        check({name: (source, to[name]) for name, source in zip(LAYOUTS, sources, strict=True)}, number)


def other(rank: int, source: Config, config: Config) -> None:
    with process_group(config) as world:
        backend = backends.chosen(config)
        engine = backend.wrap(build.build_on_meta(config), config, world, resumed=True)
        with pytest.raises(RunError, match=r"lora_A.* is not in it: resume with the layout it is of"):
            reshard.load(backend, engine, checkpointing.to_merge(source)[0], Backend.zero)


@pytest.mark.proof
def test_what_is_not_in_it_is_named_on_all_ranks(compose, tmp_path):
    source = targets(compose, tmp_path / "from", ["zero3"])
    spawn(write, 2, source)
    spawn(other, 2, source[0], *targets(compose, tmp_path / "to", ["fsdp"], "adapter=lora"))
