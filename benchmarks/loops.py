"""Training loops written by hand on transformers' Llama: the ceilings that `benchmarks/train_speed.py` measures Muster against.

    torchrun --nproc-per-node 8 benchmarks/loops.py fsdp --micro-batch 2 [--float8 tensorwise|rowwise]
    torchrun --nproc-per-node 8 benchmarks/loops.py zero3 --micro-batch 2
    torchrun --nproc-per-node 8 benchmarks/loops.py trainer [--tuned --micro-batch 2]      transformers.Trainer
    python benchmarks/loops.py lora|qlora --micro-batch 4 --length 4096                    PEFT on one GPU

Random weights and random tokens, bf16 compute (fp32 master weights in full fine-tunes), fused AdamW, clipping, no
recomputation but in the Trainer's defaults. One RESULT line: tokens/s a rank (median of the steps after the fourth), model FLOP
utilisation of `--peak`, peak GiB that torch reserved, the loss. `--shape tiny` rehearses all of it on CPUs.
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
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.runs import shape  # noqa: E402
from jobs.monitoring.flops import Work  # noqa: E402

WARM = 4
"""Steps that are not timed: compilation, autotuning, the allocator."""
GPU = torch.cuda.is_available()


def rotary(model: nn.Module, config: LlamaConfig, device: torch.device) -> None:
    """Frequencies in fp32: they were made on the meta device, or in the dtype of the weights."""
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)


def draw(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            held = getattr(parameter, "ds_tensor", parameter)
            getattr(held, "to_local", lambda held=held: held)().normal_(0, 0.02)


def fused_loss(compiled: bool) -> None:
    """Liger's; its other kernels pay only where blocks are not compiled."""
    if GPU:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        others = {"rope": not compiled, "swiglu": not compiled, "rms_norm": not compiled}
        apply_liger_kernel_to_llama(**others, cross_entropy=False, fused_linear_cross_entropy=True)


def fsdp(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Callable[..., None]]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    config = shape(options.shape)
    fused_loss(options.compile)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if options.float8:
        in_8_bits(model, options.float8, gather=options.float8 == "tensorwise")
    if options.compile:
        for layer in model.model.layers:
            layer.compile()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.tie_weights()
    draw(model)
    rotary(model, config, device)
    return model, stepping(model, list(model.parameters()), device, 1e-5)


def in_8_bits(model: nn.Module, recipe: str, gather: bool) -> None:
    """torchao's products in 8 bits for all linear layers of blocks, adapters apart; `gather`: FSDP gathers in 8 bits as well."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    plan = (
        Float8LinearConfig(enable_fsdp_float8_all_gather=True)
        if gather
        else Float8LinearConfig.from_recipe_name(recipe)
    )
    convert_to_float8_training(
        model, config=plan, module_filter_fn=lambda _, name: "lm_head" not in name and "lora_" not in name
    )


def zero3(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Callable[..., None]]:
    import deepspeed

    config, bucket = shape(options.shape), 200_000_000
    fused_loss(compiled=False)
    plan = {
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
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},  # needs no nvcc at the start
    }
    with deepspeed.zero.Init(config_dict_or_path=plan, dtype=torch.bfloat16):
        model = LlamaForCausalLM(config)
    draw(model)
    rotary(model, config, device)
    engine, *_ = deepspeed.initialize(model=model, config=plan)

    def step(**batch: torch.Tensor) -> torch.Tensor:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return model, step


def lora(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Callable[..., None]]:
    from peft import LoraConfig, get_peft_model

    config = shape(options.shape)
    fused_loss(options.compile)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.tie_weights()
    draw(model)
    rotary(model, config, device)
    if options.loop == "qlora":
        pack(model, device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    if options.float8:
        in_8_bits(model, options.float8, gather=False)
    if options.compile:
        for layer in model.get_base_model().model.layers:
            layer.compile()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, stepping(model, trained, device, 1e-4, autocast=True)


def pack(model: nn.Module, device: torch.device) -> None:
    """NF4 with double quantisation, by bitsandbytes, layer by layer."""
    import bitsandbytes as bnb

    like: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.bfloat16}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, **like, device="cpu"
            )
            new.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, module=new, **like)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new.to(device))
    model.is_loaded_in_4bit = True
    if GPU:
        torch.cuda.empty_cache()


def stepping(
    model: nn.Module, trained: list[nn.Parameter], device: torch.device, rate: float, autocast: bool = False
) -> Callable[..., torch.Tensor]:
    optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)

    def step(**batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def trainer(options: argparse.Namespace, device: torch.device) -> tuple[list[float], int, float]:
    """(seconds of each step, parameters, the loss) of transformers.Trainer under FSDP2."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config, length = shape(options.shape), options.length
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.tie_weights()
    draw(model)
    rotary(model, config, device)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 100_000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": row, "labels": row}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            settle()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            settle()
            self.times.append(time.perf_counter() - self.began)

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
        count = sum(parameter.numel() for parameter in model.parameters())
        said = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[clock]).train()
    return clock.times, count, said.training_loss


def settle() -> None:
    if GPU:
        torch.cuda.synchronize()


def timed(options: argparse.Namespace, device: torch.device) -> tuple[list[float], int, float]:
    """(seconds of each step, parameters of the base, the last loss)."""
    model, step = {"fsdp": fsdp, "zero3": zero3, "lora": lora, "qlora": lora}[options.loop](options, device)
    count = sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    )
    model.train()
    generator = torch.Generator(device).manual_seed(int(os.environ.get("RANK", "0")))
    size = options.micro_batch, options.length
    tokens = torch.randint(0, shape(options.shape).vocab_size, size, device=device, generator=generator)
    times: list[float] = []
    for _ in range(options.steps):
        settle()
        began = time.perf_counter()
        loss = step(input_ids=tokens, labels=tokens)
        settle()
        times.append(time.perf_counter() - began)
    return times, count, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loop", choices=("fsdp", "zero3", "lora", "qlora", "trainer"))
    parser.add_argument("--shape", default="llama8b", help="a file of conf/model")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--float8", choices=("tensorwise", "rowwise"))
    parser.add_argument("--tuned", action="store_true", help="the Trainer in an expert's hands")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=GPU)
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of one rank")
    options = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
        if options.loop != "trainer" or options.tuned:  # torch would take its flash kernel, which is slower on Hopper
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_math_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(True)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if GPU else "gloo", device_id=device if GPU else None)
    times, count, loss = (trainer if options.loop == "trainer" else timed)(options, device)
    if int(os.environ.get("RANK", "0")) == 0:
        config, length = shape(options.shape), options.length
        embedding = config.vocab_size * config.hidden_size
        width = config.num_attention_heads * config.head_dim
        work = Work(count - 2 * embedding, embedding, config.num_hidden_layers, width, "lora" in options.loop)
        second = statistics.median(times[min(WARM, len(times) - 1) :])
        rate = options.micro_batch * length / second
        found = {
            "loop": options.loop
            + ("_tuned" if options.tuned else "")
            + (f"_{options.float8}" if options.float8 else ""),
            "micro_batch": options.micro_batch,
            "compile": options.compile,
            "tokens_per_s_per_rank": round(rate, 1),
            "mfu": round(rate * work.flops(length, length, length**2) / length / options.peak, 4),
            "gib": round(torch.cuda.max_memory_reserved() / 2**30, 1) if GPU else None,
            "first_step_s": round(times[0], 1),
            "loss": round(loss, 3),
        }
        print("RESULT", json.dumps(found), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
