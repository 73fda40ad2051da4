"""Trains tiny models of several families on this machine's GPU in bf16, and compares each with a run on CPUs in fp32.

    python benchmarks/families_gpu.py [--families qwen3_moe,gpt_oss] [--ways full,lora_packed] [--at-once 4]

The models have a few layers with random weights, and heads of the real sizes. Both runs are made by `launch.py` from the same
rows of random tokens. A line says by how much the loss differs at worst over all steps, by how much the gradient norm of step 1
differs, how long the first step took (it compiles), a later step, and each later step that took more than a second. Without a GPU,
smaller models are trained on CPUs in bf16: this only tries the benchmark itself.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import runs  # noqa: E402

STEPS, LENGTH, ROWS = 20, 512, 120
LIMITS = {"loss": 0.01, "grad_norm": 0.05}
"""Largest relative differences that bf16 explains: products have 8 bits, and a token may be routed to another expert."""
VOCABULARY = 2048
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 2 * LENGTH, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "norm_topk_prob": True,
    },
    "gpt_oss": {
        "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 512, "sliding_window": 128,
    },
    "qwen3_5_text": {
        "head_dim": 128, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4,
    },
    "gemma3_text": {"head_dim": 256, "sliding_window": 128, "query_pre_attn_scalar": 256, "num_hidden_layers": 6},
    "gemma2": {"head_dim": 256, "sliding_window": 128, "query_pre_attn_scalar": 256},
    "deepseek_v3": {
        "num_key_value_heads": 8, "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 128, "q_lora_rank": 256, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 4, "topk_group": 2,
    },
}  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYERS = {"qwen3_moe": ["q_proj", "v_proj"], "gpt_oss": ["q_proj", "v_proj"], "deepseek_v3": ["q_b_proj", "kv_b_proj"]}
"""Layers that get an adapter beside those on the experts, in families of mixtures of experts."""
PACKED, LORA = ["data.packing=true"], ["adapter=lora", "adapter.r=8"]
WAYS: dict[str, list[str]] = {
    "full": ["train.activation_checkpointing=none"],
    "full_selective": ["train.activation_checkpointing=selective"],
    "full_packed": [*PACKED, "train.activation_checkpointing=full"],
    "lora": [*LORA, "train.activation_checkpointing=none"],
    "lora_packed": [*LORA, *PACKED, "train.activation_checkpointing=full"],
    "lora_packed_uncompiled": [*LORA, *PACKED, "train.activation_checkpointing=none", "train.compile=false"],
    "experts": [*LORA, "train.activation_checkpointing=selective"],
    "experts_packed": [*LORA, *PACKED, "train.activation_checkpointing=full"],
}
"""Name -> overrides. `experts` adapts the experts too. Everything else is chosen by Muster."""
NOT_COMPARED = ("train.activation_checkpointing", "train.compile")
"""Settings that must not change the loss: ways that differ in them only are compared with one run on CPUs."""


def write_model(folder: Path, family: str, small: bool) -> None:
    """Write a checkpoint in bf16 with random weights that are large enough for errors to show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SIZES | FAMILIES[family] | ({"num_hidden_layers": 4, "hidden_size": 64} if small else {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 0.03)
            elif "sink" in name:
                weight.normal_(0, 1.0)
            elif "bias" in name or "norm" in name:
                weight.add_(torch.randn(weight.shape) * 0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    runs.write_tokenizer(folder, VOCABULARY)


def overrides(family: str, way: str, folder: Path) -> list[str]:
    """What the two runs have in common."""
    targets = [f"adapter.targets=[{','.join(LAYERS[family] + EXPERTS)}]"] if way.startswith("experts") else []
    if way.startswith("lora") and family in LAYERS:  # `all-linear` would find the experts of some families
        targets = [f"adapter.targets=[{','.join(LAYERS[family])}]"]
    return [
        "model=hub", f"model.source={folder / family}", "parallel=fsdp", "pipeline=train", "cluster=local",
        "cluster.train.ranks_per_node=1", "cluster.requeue=false", "data=jsonl", f"data.path={folder / 'rows.jsonl'}",
        f"data.max_length={LENGTH}", "data.validation_fraction=0.02", "train.global_batch=4", "train.micro_batch=2",
        f"train.steps={STEPS + 1}", "train.learning_rate=3e-4", "train.warmup_steps=2", "train.save_every=0",
        "train.eval_every=0", "train.log_every=5", *WAYS[way], *targets,
    ]  # fmt: skip


def compared(words: list[str]) -> tuple[str, ...]:
    """The overrides that decide the loss."""
    return tuple(word for word in words if not word.startswith(NOT_COMPARED))


def train(folder: Path, words: list[str], limit_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run launch.py until the last step. Returns its steps and its choices; or `error`."""
    try:
        with runs.muster(
            folder, [f"run_dir={folder}", *words], lambda run: len(run.steps()) >= STEPS, limit_s, environment
        ) as run:
            chosen = ("attention", "compile", "packing:", "chosen", "adapter:")
            lines = {line for line in run.text().splitlines() if any(word in line[:60] for word in chosen)}
            return {"steps": run.steps()[:STEPS], "log": sorted(lines)}
    except RuntimeError as error:
        text = str(error)
        reason = next((line for line in text.splitlines() if line.startswith("train ")), "took too long")
        refused = next((line for line in text.splitlines() if "launch.py: " in line), None)
        verdict = "refused" if refused or reason.startswith("train user_error") else "failed"
        return {"verdict": verdict, "error": text[-6000:], "reason": refused or reason}


def compare(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The differences of a run from its reference, and its speed."""
    pairs = list(zip(run["steps"], reference["steps"], strict=True))
    loss = max(abs(ours["loss"] / other["loss"] - 1) for ours, other in pairs)
    norm = abs(pairs[0][0]["grad_norm"] / pairs[0][1]["grad_norm"] - 1)
    seconds = [step["seconds"] for step in run["steps"]]
    return {
        "verdict": "right" if loss <= LIMITS["loss"] and norm <= LIMITS["grad_norm"] else "wrong",
        "loss": loss,
        "grad_norm": norm,
        "first_step_s": round(seconds[0], 1),
        "step_ms": round(1000 * statistics.median(seconds[STEPS // 2 :])),
        "slow_steps": {number + 1: round(value, 1) for number, value in enumerate(seconds) if number and value > 1},
        "from_to": [run["steps"][0]["loss"], run["steps"][-1]["loss"]],
        "log": run["log"],
    }


def prepare(folder: Path, families: list[str], small: bool) -> None:
    """Write the models and the rows."""
    for family in families:
        write_model(folder / family, family, small)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 64 if small else LENGTH, (ROWS,), generator=generator).tolist()
    runs.write_rows(folder / "rows.jsonl", VOCABULARY, lengths)


def results_of(
    cases: list[tuple[str, str]], folder: Path, options: argparse.Namespace
) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Train all cases and what they are compared with, several at a time."""
    started = time.monotonic()
    no_gpu = ["cluster.train.gpus_per_node=0"]
    on_cpu = [*no_gpu, "train.precision=fp32", "train.compile=false", "train.activation_checkpointing=none"]
    on_gpu = ["train.precision=bf16", *([] if torch.cuda.is_available() else no_gpu)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}

    def run(name: str, words: list[str], environment: dict[str, str]) -> dict[str, Any]:
        if time.monotonic() - started > options.total:
            return {"verdict": "not run", "error": "", "reason": "--total was over"}
        return train(folder / name, words, options.limit, environment)

    with ThreadPoolExecutor(options.at_once) as pool, ThreadPoolExecutor(max(1, options.at_once // 2)) as cpu_pool:
        references: dict[tuple[str, ...], Future[dict[str, Any]]] = {}
        found: dict[tuple[str, str], tuple[Future[dict[str, Any]], Future[dict[str, Any]]]] = {}
        for family, way in cases:
            words = overrides(family, way, folder)
            key = compared(words)
            if key not in references:
                references[key] = cpu_pool.submit(run, f"{family}-{way}-cpu", [*key, *on_cpu], hidden)
            found[family, way] = pool.submit(run, f"{family}-{way}", words + on_gpu, {}), references[key]
        for case, (future, reference) in found.items():
            both = future.result(), reference.result()
            yield case, next((item for item in both if "error" in item), None) or compare(*both)


def line(case: tuple[str, str], result: dict[str, Any]) -> str:
    """One row of the table."""
    if "error" in result:
        return f"| {case[0]} | {case[1]} | {result['verdict']} | | | | | {result['reason'][:200]} |"
    return (
        f"| {case[0]} | {case[1]} | {result['verdict']} | {result['loss']:.1e} | {result['grad_norm']:.1e} | "
        f"{result['first_step_s']} s | {result['step_ms']} ms | {result['slow_steps'] or ''} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 1) // 3), help="runs at the same time")
    parser.add_argument("--limit", type=float, default=150, help="longest time of one run in seconds")
    parser.add_argument("--total", type=float, default=3600, help="start no run after this many seconds")
    parser.add_argument("--folder", type=Path, help="where runs and their logs are kept; by default they are removed")
    parser.add_argument("--out", type=Path, default=Path("families_gpu.json"), help="file for all results, as JSON")
    options = parser.parse_args()
    families, ways = options.families.split(","), options.ways.split(",")
    cases = [(family, way) for way in ways for family in families if "experts" not in way or family in LAYERS]
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="families-")))
        folder.mkdir(exist_ok=True)
        prepare(folder, families, small=not torch.cuda.is_available())
        for case, result in results_of(cases, folder, options):
            results[" ".join(case)] = result
            print(line(case, result), flush=True)
            options.out.write_text(json.dumps(results, indent=1))
    sys.exit(any(result["verdict"] in ("wrong", "failed") for result in results.values()))


if __name__ == "__main__":
    main()
