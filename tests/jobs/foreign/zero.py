"""Checkpoints of DeepSpeed, two steps after the start."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.jobs.foreign import models

Case = dict[str, Any]
BF16 = {"bf16": {"enabled": True}}


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for stage in (1, 2, 3):
        for model in ("tied", "untied"):
            cases[f"z{stage}-fp32-{model}"] = {"model": model, "stage": stage}
            cases[f"z{stage}-bf16-{model}"] = {"model": model, "stage": stage, "config": BF16}
        cases[f"z{stage}-fp32-frozen"] = {"model": "untied", "stage": stage, "frozen": True}
        cases[f"z{stage}-bf16-frozen"] = {"model": "untied", "stage": stage, "frozen": True, "config": BF16}
        cases[f"z{stage}-bf16-odd"] = {"model": "odd", "stage": stage, "config": BF16}
        cases[f"z{stage}-bf16-moe"] = {"model": "moe", "stage": stage, "config": BF16}
        left_out = {"model": "untied", "stage": stage, "frozen": True, "config": BF16, "left_out": True}
        cases[f"z{stage}-bf16-nofrozen"] = left_out
    cases["z0-fp32"] = {"model": "untied", "stage": 0}
    cases["z0-bf16"] = {"model": "untied", "stage": 0, "config": BF16}
    cases["z1-bf16-acc32"] = {
        "model": "odd", "stage": 1, "config": {**BF16, "data_types": {"grad_accum_dtype": "fp32"}},
    }  # fmt: skip
    cases["z2-fp32-roundrobin"] = {"model": "untied", "stage": 2, "zero": {"round_robin_gradients": True}}
    small_groups = {"stage3_param_persistence_threshold": 0, "sub_group_size": 7000}
    cases["z3-bf16-subgroups"] = {"model": "odd", "stage": 3, "config": BF16, "zero": small_groups}
    cases["z3-bf16-hpz"] = {"model": "untied", "stage": 3, "config": BF16, "zero": {"zero_hpz_partition_size": 2}}
    cases["z3-bf16-init"] = {"model": "untied", "stage": 3, "config": BF16, "cut_on_loading": True}
    cases["z3-bf16-init-tied"] = {"model": "tied", "stage": 3, "config": BF16, "cut_on_loading": True}
    on_cpu = {"device": "cpu"}
    cases["z2-offload"] = {"model": "untied", "stage": 2, "config": BF16, "zero": {"offload_optimizer": on_cpu}}
    both = {"offload_optimizer": on_cpu, "offload_param": on_cpu}
    cases["z3-offload"] = {"model": "untied", "stage": 3, "config": BF16, "zero": both}
    for name in ("z1-bf16-frozen", "z2-bf16-tied", "z3-bf16-frozen", "z3-bf16-odd"):
        cases[f"universal-{name}"] = {**cases[name], "universal": True}
    return cases


CASES = _cases()


def write(_: int, folder: Path, names: list[str]) -> None:
    """On every rank: folder/NAME/{base,ck,truth.pt} of each case."""
    models.start()
    models.start_deepspeed()
    for name in names:
        _write_case(folder / name, **CASES[name])
    dist.barrier()
    dist.destroy_process_group()


def _write_case(
    folder: Path, model: str, stage: int, *, config: Case | None = None, zero: Case | None = None, frozen: bool = False,
    left_out: bool = False, cut_on_loading: bool = False, universal: bool = False,
) -> None:  # fmt: skip
    import deepspeed

    base = models.save_base(model, folder)
    settings = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage, **(zero or {})}, "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True, **(config or {}),
    }  # fmt: skip
    net = _load_cut(base, settings) if cut_on_loading else models.build(model)
    if frozen:
        for parameter in [*net.model.layers[0].parameters(), net.model.embed_tokens.weight]:
            parameter.requires_grad_(False)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if len(_shape(parameter)) > 1]},
        {"params": [parameter for parameter in trained if len(_shape(parameter)) < 2], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=settings)
    for step in range(2):
        tokens = models.batch(step)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    # with round_robin_gradients, DeepSpeed's own function reads each weight from the place of another
    as_they_are = not stage or "round_robin_gradients" in (zero or {})
    live = {
        name: parameter if as_they_are else models.whole_parameter(parameter)
        for name, parameter in net.named_parameters(remove_duplicate=False)
    }
    models.keep_truth(live, folder)
    engine.save_checkpoint(str(folder / "ck"), exclude_frozen_parameters=left_out)
    dist.barrier()
    if universal and dist.get_rank() == 0:
        _make_universal(folder / "ck")
    dist.barrier()
    engine.destroy()


def _make_universal(checkpoint: Path) -> None:
    """With DeepSpeed's own program; only what it makes is left."""
    written = checkpoint / (checkpoint / "latest").read_text()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    words = ["--input_folder", str(written), "--output_folder", str(checkpoint / "universal")]
    subprocess.run([*command, *words], check=True, capture_output=True)
    shutil.rmtree(written)
    (checkpoint / "latest").unlink()
    (checkpoint / "latest_universal").write_text("universal")


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _load_cut(base: Path, settings: Case) -> Any:
    """Loaded in parts: no rank has the whole model at any time."""
    from transformers.integrations import HfDeepSpeedConfig

    kept = HfDeepSpeedConfig({**settings, "train_batch_size": 2 * dist.get_world_size()})
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    del kept
    return net
