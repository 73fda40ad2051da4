"""Checkpoints of PEFT under DeepSpeed: base, adapters and trained copies in the files of the ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.jobs.foreign import models

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "saved-head": {"modules_to_save": ["lm_head"]},
}
CASES = {
    f"peft-z{stage}-{kind}-{model}": (model, stage, kind)
    for model, stages in (("untied", (1, 2, 3)), ("tied", (2,)))
    for stage in stages
    for kind in KINDS
    if stage != 1 or kind == "plain"
}


def write(_: int, folder: Path, names: list[str]) -> None:
    """On every rank: folder/NAME/{base,ck,truth.pt} of each case."""
    models.start()
    models.start_deepspeed()
    for name in names:
        _write_case(folder / name, *CASES[name])
    dist.barrier()
    dist.destroy_process_group()


def _write_case(folder: Path, model: str, stage: int, kind: str) -> None:
    import deepspeed
    from peft import LoraConfig, get_peft_model

    base = models.save_base(model, folder)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
        init_lora_weights=kind == "dora", base_model_name_or_path=str(base), **KINDS[kind],
    )  # fmt: skip
    net = get_peft_model(models.build(model), config)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.AdamW(trained, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "steps_per_print": 10**9,
            "zero_force_ds_cpu_optimizer": False,
        },
    )  # fmt: skip
    for step in range(2):
        tokens = models.batch(step)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    live = {name: models.whole_parameter(item) for name, item in net.named_parameters(remove_duplicate=False)}
    if dist.get_rank() == 0:
        whole = get_peft_model(models.build(model), config)
        whole.load_state_dict(live, strict=False)
        models.keep_truth(whole.merge_and_unload().state_dict(), folder)
        (folder / "ck").mkdir()
        config.save_pretrained(str(folder / "ck"))
    dist.barrier()
    engine.save_checkpoint(str(folder / "ck"))
    dist.barrier()
    engine.destroy()
