"""Runs a program of examples/custom and records what it did: `observed.py FOLDER STOP_AT SCRIPT ARGUMENTS...`.

FOLDER/batches-RANK.jsonl gets a line for each batch in the forward of the model: its tokens, and the loss computed from its logits.
FOLDER/found-RANK.json gets what Accelerate and the Trainer made of the environment. The first start is asked to stop when it has
seen STOP_AT batches.
"""

import functools
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

PRETENDS = "TESTS_PRETEND_TO_HAVE_GPUS"


def record_batches(file: Path, stop_at: int) -> None:
    """Let every forward of a Llama write its tokens and its loss, and the one with the number `stop_at` ask to stop."""
    forward = LlamaForCausalLM.forward
    seen = 0

    @functools.wraps(forward)
    def recording(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal seen
        result = forward(self, *arguments, **named)
        tokens, logits = named["input_ids"], result.logits.detach().float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"loss": loss, "tokens": tokens.tolist()}) + "\n")
        seen += 1
        if seen == stop_at and os.environ["RANK"] == "0" and os.environ["MUSTER_ATTEMPT"] == "1":
            Path(os.environ["MUSTER_STOP_FILE"]).touch()
        return result

    LlamaForCausalLM.forward = recording  # type: ignore[method-assign]


def pretend_to_have_gpus() -> None:
    """Let Accelerate shard by FSDP on CPUs over Gloo, which it refuses there: for a rehearsal without GPUs."""

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    PartialState.set_device = set_device  # type: ignore[method-assign]
    del os.environ["ACCELERATE_USE_CPU"]


def found(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, object]:
    """What Accelerate made of the environment, in words that compare with the config of the run."""
    state = accelerator.state
    result: dict[str, object] = {
        "kind": accelerator.distributed_type.value,
        "ranks": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "backend": torch.distributed.get_backend(),
    }
    if accelerator.distributed_type is DistributedType.FSDP:
        parameters = list(model.named_parameters())
        result |= {
            "version": state.fsdp_plugin.fsdp_version,
            "reshards": state.fsdp_plugin.reshard_after_forward,
            "sharded": all(isinstance(item, DTensor) and item.placements[0].is_shard() for _, item in parameters),
            "blocks": sum(
                isinstance(item, FSDPModule) and isinstance(item, LlamaDecoderLayer) for item in model.modules()
            ),
            "stored_as": sorted({str(item.dtype) for _, item in parameters}),
        }
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        engine = accelerator.deepspeed_engine_wrapped.engine
        result |= {
            "stage": engine.zero_optimization_stage(),
            "micro_batch": engine.train_micro_batch_size_per_gpu(),
            "batch": engine.train_batch_size(),
            "accumulated": engine.gradient_accumulation_steps(),
            "clipping": engine.gradient_clipping(),
            "computes_in": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
            "optimizer": type(engine.optimizer).__name__,
        }
    return result


def main() -> None:
    folder, stop_at, script, *arguments = sys.argv[1:]
    rank = os.environ["RANK"]
    record_batches(Path(folder) / f"batches-{rank}.jsonl", int(stop_at))
    if PRETENDS in os.environ:
        pretend_to_have_gpus()
    Accelerator.end_training = lambda _: None  # type: ignore[method-assign]  # what it ends is looked at below
    sys.argv = [script, *arguments]
    names = runpy.run_path(script, run_name="__main__")
    trainer = names.get("trainer")
    accelerator = trainer.accelerator if trainer else names["accelerator"]
    model = trainer.model_wrapped if trainer else names["model"]
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found(accelerator, model)), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
