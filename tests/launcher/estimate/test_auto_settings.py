"""launcher/estimate/auto_settings.py: the choice fits, nothing faster fits, and the run folder stores it."""

from pathlib import Path

import pytest

from conf import resolve
from conf.choices import Checkpointing
from conf.schema import Config
from launcher.estimate import auto_settings, memory
from launcher.estimate.table import GIB
from tests.conftest import Compose, Launch, put

AUTO = ["cluster=slurm", "model=llama8b", "train.activation_checkpointing=auto"]
LONG = ["data.max_length=8192", "cluster.train.nodes=1", "train.global_batch=64"]


@pytest.mark.parametrize("capacity", [139, 79, 60, 47, 40, 34])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_the_fastest_that_fits_is_chosen(compose: Compose, capacity: float, micro: int | None) -> None:
    config = put(
        compose(*AUTO, *LONG, "cluster.train.gpu_memory_gib=139"),
        {"cluster.train.gpu_memory_gib": capacity, "train.micro_batch": micro},
    )
    found, (line,) = auto_settings.choose(config)
    faster = []
    for tried in auto_settings._candidates(config):
        size = memory.estimate(tried)
        assert size
        if tried == found:
            fits = size.device.total <= auto_settings.MARGIN * capacity * GIB
            assert fits or "needs the least memory" in line
            break
        faster.append(size.device.total)
    assert all(total > auto_settings.MARGIN * capacity * GIB for total in faster)
    assert f"train.activation_checkpointing={found.train.activation_checkpointing.name}" in line
    assert config.train.activation_checkpointing is Checkpointing.auto  # the one given is left as it is


def chosen(compose: Compose, *words: str) -> tuple[str, int | None, str]:
    return choice(compose(*words))


def choice(given: Config) -> tuple[str, int | None, str]:
    config, lines = auto_settings.choose(given)
    return config.train.activation_checkpointing.name, config.train.micro_batch, " ".join(lines)


def test_more_memory_never_chooses_a_slower_mode(compose: Compose) -> None:
    config = compose(*AUTO, *LONG, "cluster.train.gpu_memory_gib=139")
    modes = [choice(put(config, {"cluster.train.gpu_memory_gib": float(size)}))[0] for size in range(30, 140, 3)]
    positions = [[item.name for item in auto_settings.MODES].index(mode) for mode in modes]
    assert positions == sorted(positions, reverse=True)
    assert {"none", "selective", "full"} <= set(modes)


def test_the_micro_batch_is_limited_to_what_keeps_a_gpu_busy(compose: Compose) -> None:
    words = ["cluster=slurm", "model=llama8b", "train.micro_batch=null", "cluster.train.gpu_memory_gib=139", *LONG]
    assert chosen(compose, *words)[:2] == ("none", 2)
    assert chosen(compose, *words, "data.max_length=32768", "parallel=zero3")[1] == 1


@pytest.mark.parametrize(
    ("layout", "capacity", "again"),
    [("fsdp", 139, False), ("fsdp", 70, True), ("hsdp", 139, False), ("zero3", 139, None)],
)
def test_gathered_parameters_are_kept_if_they_fit(
    compose: Compose, layout: str, capacity: float, again: bool | None
) -> None:
    words = ["cluster=slurm", "model=llama8b", "train.micro_batch=1", f"cluster.train.gpu_memory_gib={capacity}", *LONG]
    config, (line,) = auto_settings.choose(compose(*words, f"parallel={layout}"))
    assert config.train.activation_checkpointing is Checkpointing.none
    assert config.parallel.reshard_after_forward is again
    assert (f"parallel.reshard_after_forward={str(again).lower()}" in line) is (again is not None)


def test_settings_of_the_user_stay(compose: Compose) -> None:
    asked = [
        "train.micro_batch=3",
        "train.activation_checkpointing=selective",
        "parallel.reshard_after_forward=true",
    ]
    config = compose("cluster=slurm", "model=llama8b", "cluster.train.gpu_memory_gib=139", *asked)
    assert auto_settings.choose(config) == (config, [])


@pytest.mark.parametrize(
    ("words", "mode", "why"),
    [
        ([*AUTO, "train.micro_batch=null"], "full", "Set cluster.train.gpu_memory_gib to get the fastest"),
        (["cluster=slurm", "model=hub", "model.source=a/b", "train.activation_checkpointing=auto",
          "cluster.train.gpu_memory_gib=79"], "full", "because model.architecture is not known"),
        (["model=tiny"], "none", ""),  # on CPUs
        (["cluster=slurm", "model=llama8b"], "full", "parallel.reshard_after_forward=true: most likely fits"),
    ],
)  # fmt: skip
def test_the_reason_is_given_if_nothing_can_be_estimated(
    compose: Compose, words: list[str], mode: str, why: str
) -> None:
    found, micro, line = chosen(compose, *words)
    assert (found, micro) == (mode, micro or 1)
    assert why in line


def test_the_run_folder_stores_the_choice(launch: Launch, tmp_path: Path) -> None:
    words = [*AUTO, *LONG, "train.micro_batch=null", "cluster.train.gpu_memory_gib=79", f"run_dir={tmp_path}/run"]
    for _ in range(2):  # the second time it must choose the same
        done = launch(*words, "submit=script")
        assert done.returncode == 0, done.stderr
    stored = resolve.load(tmp_path / "run/config.yaml").train
    mode, rows = stored.activation_checkpointing, stored.micro_batch
    again = str(resolve.load(tmp_path / "run/config.yaml").parallel.reshard_after_forward).lower()
    settings = (
        f"train.activation_checkpointing={mode.name} train.micro_batch={rows} parallel.reshard_after_forward={again}"
    )
    assert f"chosen    {settings}: the fastest that fits" in done.stdout
    assert mode is not Checkpointing.auto


def test_a_run_that_cannot_fit_is_refused_with_one_that_would(launch: Launch) -> None:
    done = launch(*AUTO, *LONG, "parallel=ddp", "cluster.train.gpu_memory_gib=79", "dry_run=true")
    assert done.returncode == 2
    assert "Use parallel=fsdp (" in done.stderr
