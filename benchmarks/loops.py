"""Training loops written by hand for transformers' Llama. `benchmarks/train_speed.py` compares Muster with them.

    torchrun --nproc-per-node 8 benchmarks/loops.py fsdp --micro-batch 2 [--float8 tensorwise|rowwise]
    torchrun --nproc-per-node 8 benchmarks/loops.py zero3 --micro-batch 2
    torchrun --nproc-per-node 8 benchmarks/loops.py trainer [--tuned --micro-batch 2]      transformers.Trainer
    python benchmarks/loops.py lora|qlora --micro-batch 4 --length 4096                    PEFT on one GPU

All train random weights on random tokens: bf16 compute (fp32 master weights in a full fine-tune), fused AdamW, gradient clipping,
and no activation checkpointing except in the Trainer's defaults. The last line is RESULT with tokens/s per rank (median of
the steps after the fourth), MFU relative to `--peak`, the peak GiB that torch reserved, and the loss. FLOPs are counted by the
function that Muster uses (jobs/monitoring/flops.py). `--shape tiny` tries everything on CPUs.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loop_models import (  # noqa: E402
    GPU,
    materialize,
    quantize_nf4,
    randomize,
    reset_rotary,
    use_float8,
    use_liger,
)
from benchmarks.runs import shape  # noqa: E402
from jobs.monitoring.flops import ModelFlops, count_weights  # noqa: E402

WARMUP_STEPS = 4
"""These steps are not counted: they compile, autotune and allocate memory."""


Step = Callable[..., torch.Tensor]
"""Takes input_ids and labels, int64 of shape (rows, length); does one optimizer step and returns the loss."""


class Timing(NamedTuple):
    """What a loop measured."""

    step_s: list[float]
    """Seconds of each step."""
    loss: float


def fsdp(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Step]:
    """FSDP2 with compiled blocks."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    config = shape(options.shape)
    use_liger(options.compile)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if options.float8:
        use_float8(model, options.float8, float8_all_gather=options.float8 == "tensorwise")
    if options.compile:
        for layer in model.model.layers:
            layer.compile()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    materialize(model, config, device)
    return model, make_step(model, list(model.parameters()), device, learning_rate=1e-5)


def zero3(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Step]:
    """DeepSpeed ZeRO-3 with Liger's kernels, without compilation."""
    import deepspeed

    config, bucket = shape(options.shape), 200_000_000
    use_liger(compiled=False)
    deepspeed_config = {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 40960,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            "sub_group_size": 10**9,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},  # DeepSpeed's own would need nvcc
    }
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config, dtype=torch.bfloat16):
        model = LlamaForCausalLM(config)
    randomize(model)
    reset_rotary(model, config, device)
    engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config)

    def step(**batch: torch.Tensor) -> torch.Tensor:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return model, step


def lora(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Step]:
    """PEFT's LoRA on all linear layers, with compiled blocks; also QLoRA."""
    from peft import LoraConfig, get_peft_model

    config = shape(options.shape)
    use_liger(options.compile)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    materialize(model, config, device)
    if options.loop == "qlora":
        quantize_nf4(model, device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    if options.float8:
        use_float8(model, options.float8, float8_all_gather=False)
    if options.compile:
        for layer in model.get_base_model().model.layers:
            layer.compile()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, make_step(model, trained, device, learning_rate=1e-4, autocast=True)


def make_step(
    model: nn.Module, trained: list[nn.Parameter], device: torch.device, *, learning_rate: float, autocast: bool = False
) -> Step:
    """A step with fused AdamW and gradient clipping."""
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=True)

    def step(**batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def time_trainer(options: argparse.Namespace, device: torch.device) -> Timing:
    """Time transformers.Trainer under FSDP2, with its defaults or tuned."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config, length = shape(options.shape), options.length
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    materialize(model, config, device)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 100_000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": row, "labels": row}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.step_s: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.step_s.append(time.perf_counter() - self.began)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=options.micro_batch, max_steps=options.steps, bf16=GPU,
            max_grad_norm=1.0, gradient_checkpointing=not options.tuned, optim="adamw_torch_fused",
            gradient_checkpointing_kwargs={"use_reentrant": False}, logging_steps=1000, save_strategy="no", report_to=[],
            use_liger_kernel=options.tuned and GPU, use_cpu=not GPU, fsdp="full_shard auto_wrap" if GPU else "",
            fsdp_config={
                "version": 2, "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "reshard_after_forward": True, "cpu_ram_efficient_loading": False,
            } if GPU else None,
        )  # fmt: skip
        output = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[clock]).train()
    return Timing(clock.step_s, output.training_loss)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def time_loop(options: argparse.Namespace, device: torch.device) -> Timing:
    """Time a loop written by hand; the loss is that of the last step."""
    model, step = {"fsdp": fsdp, "zero3": zero3, "lora": lora, "qlora": lora}[options.loop](options, device)
    model.train()
    generator = torch.Generator(device).manual_seed(int(os.environ.get("RANK", "0")))
    size = options.micro_batch, options.length
    tokens = torch.randint(0, shape(options.shape).vocab_size, size, device=device, generator=generator)
    step_s: list[float] = []
    for _ in range(options.steps):
        synchronize()
        began = time.perf_counter()
        loss = step(input_ids=tokens, labels=tokens)
        synchronize()
        step_s.append(time.perf_counter() - began)
    return Timing(step_s, loss.item())


def count_flops(options: argparse.Namespace) -> ModelFlops:
    """Count on a model without weights: sharded or quantized parameters do not show the shapes of the matrices."""
    frozen = "lora" in options.loop
    with torch.device("meta"):
        model = LlamaForCausalLM(shape(options.shape)).requires_grad_(not frozen)
    return count_weights(model, frozen=frozen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loop", choices=("fsdp", "zero3", "lora", "qlora", "trainer"))
    parser.add_argument("--shape", default="llama8b", help="a file of conf/model")
    parser.add_argument("--micro-batch", type=int, default=1, help="rows per rank and step")
    parser.add_argument("--length", type=int, default=8192, help="tokens per row")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--float8", choices=("tensorwise", "rowwise"))
    parser.add_argument("--tuned", action="store_true", help="trainer: with settings tuned by hand")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=GPU, help="compile each block")
    parser.add_argument("--peak", type=float, default=989e12, help="peak FLOP/s of one GPU, for the MFU")
    options = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
        if (
            options.loop != "trainer" or options.tuned
        ):  # by itself torch takes its flash kernel, which is slower on Hopper
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_math_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(True)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if GPU else "gloo", device_id=device if GPU else None)
    step_s, loss = (time_trainer if options.loop == "trainer" else time_loop)(options, device)
    if int(os.environ.get("RANK", "0")) == 0:
        length = options.length
        row_flops = count_flops(options).training(tokens=length, trained_tokens=length, squared_lengths=length**2)
        rows_per_s = options.micro_batch / statistics.median(step_s[min(WARMUP_STEPS, len(step_s) - 1) :])
        result = {
            "loop": options.loop
            + ("_tuned" if options.tuned else "")
            + (f"_{options.float8}" if options.float8 else ""),
            "micro_batch": options.micro_batch,
            "compile": options.compile,
            "tokens_per_s_per_rank": round(rows_per_s * length, 1),
            "mfu": round(rows_per_s * row_flops / options.peak, 4),
            "gib": round(torch.cuda.max_memory_reserved() / 2**30, 1) if GPU else None,
            "first_step_s": round(step_s[0], 1),
            "loss": round(loss, 3),
        }
        print("RESULT", json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
