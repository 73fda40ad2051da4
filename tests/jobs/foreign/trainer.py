"""Checkpoints of transformers.Trainer: `checkpoint-2`, whole models and PEFT, under DeepSpeed and DDP."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.jobs.foreign import models

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "saved-head": {"modules_to_save": ["lm_head"]},
}
NOT_TRAINABLE = (("z3", "dora"), ("z3", "saved-head"))
"""DeepSpeed's ZeRO-3 refuses the mixed dtypes of what PEFT trains here."""
CASES = {
    f"trainer-{layout}-{kind}-{model}": (layout, kind, model)
    for layout in ("ddp", "z1", "z2", "z3")
    for kind in ("whole", *ADAPTERS)
    for model in ("untied", "tied")
    if kind == "whole" or (model == "untied" and layout != "z1" and (layout, kind) not in NOT_TRAINABLE)
}


def write(rank: int, folder: Path, name: str) -> None:
    """On every rank: folder/NAME/{base,run/checkpoint-2,truth.pt}. One case in a process: Trainer sets global state."""
    layout, kind, model = CASES[name]
    folder = folder / name
    models.start()
    models.start_deepspeed()
    base = models.save_base(model, folder)
    stage = int(layout[1]) if layout != "ddp" else None
    args = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=stage is not None,
        save_steps=2, logging_steps=1, report_to=[], deepspeed=_deepspeed(stage), learning_rate=1e-2, disable_tqdm=True,
        ddp_backend="gloo", dataloader_pin_memory=False,
    )  # fmt: skip
    net: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if stage == 3 else torch.float32)
    if kind != "whole":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **ADAPTERS[kind]
        )  # fmt: skip
        net = get_peft_model(net, config)
    torch.manual_seed(1)
    rows = [torch.randint(3, 1000, (16,)) for _ in range(16)]
    trainer = Trainer(model=net, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    net = trainer.model
    live = {item: models.whole_parameter(value) for item, value in net.named_parameters(remove_duplicate=False)}
    if kind != "whole" and rank == 0:
        live = _merged(live, net, model)
    models.keep_truth(live, folder)
    dist.barrier()
    dist.destroy_process_group()


def _deepspeed(stage: int | None) -> dict[str, Any] | None:
    if stage is None:
        return None
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
    }  # fmt: skip


def _merged(live: dict[str, torch.Tensor], net: Any, model: str) -> dict[str, torch.Tensor]:
    """What was trained, on the stored base: the Trainer saves an adapter without its base."""
    from peft import get_peft_model
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    whole = get_peft_model(models.build(model), net.peft_config["default"])
    whole.load_state_dict({name: value for name, value in live.items() if name in trained}, strict=False)
    return whole.merge_and_unload().state_dict()
