"""What Accelerate makes of the environment of a job: the plugins in this process, and ranks that its launchers start."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf import deepspeed
from conf.files import write_json
from conf.schema import Config
from jobs.programs import command
from launcher.environment import job_variables
from launcher.plan import plan
from tests.conftest import Compose, put

LLAMA = ("cluster=slurm", "model=llama8b", "pipeline=custom", 'custom.command="train.py"')


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[object]:
    """A function that puts the environment of the job `custom` into this process."""

    def put_into_environment(config: Config) -> None:
        config = put(config, {"run_dir": str(tmp_path)})
        write_json(tmp_path / "deepspeed.json", deepspeed.exported_config(config, 32))
        custom = next(job for job in plan(config) if job.name == "custom")
        for name, value in job_variables(config, custom).items():
            monkeypatch.setenv(name, value)

    yield put_into_environment


def test_an_fsdp_program_gets_our_layout(compose: Compose, export: object) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    export(compose(*LLAMA, "parallel=fsdp", "parallel.reshard_after_forward=false"))  # type: ignore[operator]
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is False
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert "SHARDED" in str(plugin.state_dict_type)


def test_an_hsdp_program_gets_our_layout(compose: Compose, export: object) -> None:
    from accelerate.parallelism_config import ParallelismConfig

    export(compose(*LLAMA, "parallel=hsdp", "cluster.train.nodes=4"))  # type: ignore[operator]
    layout = ParallelismConfig()
    assert (layout.dp_shard_size, layout.dp_replicate_size, layout.tp_size, layout.cp_size) == (8, 4, 1, 1)


@pytest.mark.parametrize(("layout", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3)])
def test_a_deepspeed_program_gets_our_stage_and_keeps_its_batch(
    compose: Compose, export: object, layout: str, stage: int
) -> None:
    from accelerate.utils import DeepSpeedPlugin

    export(compose(*LLAMA, f"parallel={layout}"))  # type: ignore[operator]
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage
    assert plugin.is_zero3_init_enabled() is (stage == 3)
    assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == "auto"
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])  # as Accelerator does
    assert (plugin.deepspeed_config["bf16"]["enabled"], plugin.deepspeed_config["fp16"]["enabled"]) == (True, False)
    export(compose(*LLAMA, f"parallel={layout}", "+cluster.environment.ACCELERATE_GRADIENT_CLIPPING=0.5"))  # type: ignore[operator]
    assert DeepSpeedPlugin().deepspeed_config["gradient_clipping"] == 0.5


@pytest.mark.parametrize(("chosen", "enabled"), [({"bf16": True}, (True, False)), ({}, (False, False))])
def test_a_trainer_under_deepspeed_keeps_its_own_precision(
    compose: Compose, tmp_path: Path, chosen: dict[str, bool], enabled: tuple[bool, bool]
) -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
    from transformers.training_args import TrainingArguments

    config = put(compose(*LLAMA, "parallel=zero3"), {"run_dir": str(tmp_path)})
    settings = HfTrainerDeepSpeedConfig(deepspeed.exported_config(config, 32))
    settings.trainer_config_process(TrainingArguments(str(tmp_path), use_cpu=True, **chosen))  # type: ignore[arg-type]
    assert (settings.is_true("bf16.enabled"), settings.is_true("fp16.enabled")) == enabled


def test_a_deepspeed_program_learns_which_ranks_share_rows(compose: Compose, export: object) -> None:
    from accelerate.parallelism_config import ParallelismConfig

    export(compose(*LLAMA, "parallel=zero3", "parallel.context_ranks=2"))  # type: ignore[operator]
    layout = ParallelismConfig()
    assert (layout.sp_size, layout.sp_backend, layout.cp_size, layout.tp_size) == (2, "deepspeed", 1, 1)


PROGRAM = """
import json, os, sys
from accelerate import Accelerator, InitProcessGroupKwargs
accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
found = [accelerator.distributed_type.value, accelerator.num_processes, accelerator.mixed_precision,
         accelerator.gradient_accumulation_steps, os.environ["OMP_NUM_THREADS"], "NCCL_P2P_DISABLE" in os.environ]
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(found, file)
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "layout", "kind"),
    [
        ("torchrun", "ddp", "MULTI_CPU"),
        ("accelerate", "ddp", "MULTI_CPU"),
        pytest.param("torchrun", "zero3", "DEEPSPEED", marks=pytest.mark.proof),  # DeepSpeed compiles code here
        pytest.param("accelerate", "zero2", "DEEPSPEED", marks=pytest.mark.proof),
    ],
)
def test_ranks_on_cpus_train_together(compose: Compose, tmp_path: Path, launcher: str, layout: str, kind: str) -> None:
    """Without ACCELERATE_USE_CPU each rank would train alone, and each would save."""
    (tmp_path / "train.py").write_text(PROGRAM)
    config = compose(
        *LLAMA,
        f"custom.launcher={launcher}",
        f"parallel={layout}",
        "train.precision=bf16",
        "cluster.train.gpus_per_node=0",
    )
    values = {"cluster.train.nodes": 1, "cluster.train.ranks_per_node": 2, "cluster.train.cpus_per_rank": 1}
    config = put(config, {**values, "run_dir": str(tmp_path), "custom.command": f"train.py {tmp_path}"})
    write_json(tmp_path / "deepspeed.json", deepspeed.exported_config(config, 2))
    custom = next(job for job in plan(config) if job.name == "custom")
    environ = os.environ | job_variables(config, custom) | {"MUSTER_LOCAL": str(tmp_path)}
    write_json(tmp_path / command.ACCELERATE_FILE, command.accelerate_settings(environ))
    port = str(20000 + os.getpid() % 10000)
    words = command.words(config, command.Place(0, 1, "127.0.0.1", port), sys.executable, environ)
    subprocess.run(words, cwd=tmp_path, env=environ, check=True, timeout=400)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [[kind, 2, "bf16", 1, "1", False]] * 2
