"""Compares the training speed of Muster with loops written by hand and with transformers.Trainer, on this machine's GPUs.

    python benchmarks/train_speed.py [--cases fsdp,zero3,float8,packed,lora,qlora,lora_float8] [--gpus N] [--with "..."]

Muster gets the model, the layout and the adapter; on Slurm, `--with "cluster=slurm ..."` adds the settings of the site (and
`cluster.train.gpu_memory_gib`). It chooses activation checkpointing, micro batch, kernels and compilation itself. The loops
(benchmarks/loops.py) are tuned by hand. Tokens/s are per GPU, the median of the steps after the fourth. `ratio` is Muster's
tokens/s divided by those of the fastest loop of the same case. Without GPUs, a tiny model is trained to try the benchmark
itself: its figures mean nothing. `--out` is rewritten after each case.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import runs  # noqa: E402

WARMUP_STEPS, STEPS = 4, 12
"""Steps that are not counted, and steps in total."""


@dataclass(frozen=True)
class Case:
    """One comparison."""

    overrides: list[str]
    """For launch.py."""
    loops: list[list[str]]
    """Arguments of the loops that Muster is compared with. Each loop runs once for each micro batch."""
    one_gpu: bool = False
    length: int = 8192
    """Tokens of the longest row."""
    varied_lengths: bool = False
    """Rows of many lengths, as in chats, instead of equal ones."""
    from_files: bool = False
    """Read the model from files: quantized weights cannot be initialized at random, and frozen ones only slowly, on one core."""


CASES = {
    "fsdp": Case(["parallel=fsdp"], [["fsdp"], ["trainer"], ["trainer", "--tuned"]]),
    "zero3": Case(["parallel=zero3"], [["zero3"]]),
    "float8": Case(["parallel=fsdp", "train.float8=tensorwise"], [["fsdp", "--float8", "tensorwise"]]),
    "packed": Case(["parallel=fsdp", "data.packing=true"], [], varied_lengths=True),
    "lora": Case(["parallel=ddp", "adapter=lora"], [["lora"]], one_gpu=True, length=4096, from_files=True),
    "qlora": Case(["parallel=ddp", "adapter=qlora"], [["qlora"]], one_gpu=True, length=4096, from_files=True),
    "lora_float8": Case(
        ["parallel=ddp", "adapter=lora_float8"],
        [["lora"], ["lora", "--float8", "tensorwise"]],
        one_gpu=True,
        length=4096,
        from_files=True,
    ),
}


def visible_gpus(case: Case) -> dict[str, str]:
    """Environment variables that hide the other GPUs from a case for one GPU."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]} if case.one_gpu else {}


def micro_batches(case: Case, options: argparse.Namespace) -> list[int]:
    """Rows per GPU and step. The loops try each; Muster gets a global batch that allows the largest."""
    return [4] if case.one_gpu else [int(count) for count in options.rows.split(",")]


def run_muster(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train with Muster. The run is killed before its checkpoint, which is not needed."""
    vocab_size = runs.architecture(options.model)["vocab_size"]
    gpus = 1 if case.one_gpu else options.gpus
    length, batch = min(case.length, options.length), micro_batches(case, options)[-1] * gpus
    tokens = length * batch * (STEPS + 2)
    lengths = runs.chat_lengths(length, tokens) if case.varied_lengths else [length] * (tokens // length)
    data = runs.write_rows(folder / "rows.jsonl", vocab_size, lengths)
    model = ["model.init=random", f"model.tokenizer={folder / 'tokenizer'}"]
    if case.from_files:
        stored = options.stored or folder / "model"
        if not (stored / "config.json").exists():
            runs.write_model(stored, options.model)
        model = ["model.init=pretrained", f"model.source={stored}"]
    with runs.muster(
        folder / "run",
        [
            f"run_dir={folder / 'run'}", "cluster.requeue=false",
            f"model={options.model}", *model, "pipeline=train",
            "data=jsonl", f"data.path={data}", f"data.max_length={length}", "data.validation_fraction=0.01",
            f"train.steps={STEPS + 1}", f"train.global_batch={batch}", "train.log_every=4", "train.eval_every=0",
            "train.save_every=0", f"cluster.train.ranks_per_node={gpus}", *case.overrides, *options.extra,
        ],
        lambda run: len(run.steps()) >= STEPS,
        options.limit,
        visible_gpus(case),
    ) as run:  # fmt: skip
        steps = run.steps()[:STEPS]
        log = run.text()
    chosen = [line for line in log.splitlines() if line.startswith(("chosen", "attention", "estimate"))]
    timed = steps[WARMUP_STEPS:]
    return {
        "tokens_per_s_per_rank": statistics.median(line["tokens_per_s_per_rank"] for line in timed),
        "mfu": statistics.median(line.get("mfu", 0) for line in timed),
        "gib": max(line.get("memory_gib_max", 0) for line in steps),
        "first_step_s": steps[0]["seconds"],
        "chosen": chosen,
    }


def run_loop(arguments: list[str], case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Run a loop of benchmarks/loops.py. Returns its RESULT, or `error` if it fails, for example out of memory."""
    start = [] if case.one_gpu else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.gpus}"]
    command = [
        sys.executable, *start, str(ROOT / "benchmarks/loops.py"), *arguments, "--shape", options.model,
        "--length", str(min(case.length, options.length)), "--steps", str(STEPS),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=options.limit,
            env=os.environ | visible_gpus(case),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"loop": " ".join(arguments), "error": f"took longer than {options.limit} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    # torchrun's own ChildFailedError comes last and says nothing about the cause
    errors = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
    return {"loop": " ".join(arguments), "error": (errors or [done.stderr])[-1][-300:]}


def measure(name: str, case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one case with Muster and with all its loops."""
    folder.mkdir()
    runs.write_tokenizer(folder / "tokenizer", runs.architecture(options.model)["vocab_size"])
    loops = [
        run_loop([*arguments, "--micro-batch", str(rows)], case, options)
        for arguments in case.loops
        for rows in micro_batches(case, options)
    ]
    try:
        ours = run_muster(case, options, folder)
    except RuntimeError as error:
        print(f"{name}: {error}", flush=True)
        return {"error": str(error)[-500:], "loops": loops}
    best = max((one["tokens_per_s_per_rank"] for one in loops if "error" not in one), default=None)
    result = {"ratio": round(ours["tokens_per_s_per_rank"] / best, 3) if best else None, **ours, "loops": loops}
    show(name, result)
    return result


def show(name: str, result: dict[str, Any]) -> None:
    """Print a case: Muster first, then the loops."""

    def line(label: str, figures: dict[str, Any]) -> str:
        if "error" in figures:
            return f"  {label:<28} {figures['error'][:90]}"
        peak = f"{figures['gib']:6.1f} GiB" if figures.get("gib") else ""
        return f"  {label:<28} {figures['tokens_per_s_per_rank']:9,.0f} tok/s per GPU  {figures['mfu']:6.1%}  {peak}"

    print(f"{name}: ratio {result['ratio']}")
    print(line("muster", result), *(f"    {text}" for text in result["chosen"]), sep="\n")
    for one in result["loops"]:
        print(line(f"{one['loop']} {one.get('micro_batch', '')}{'' if one.get('compile') else ' eager'}", one))
    sys.stdout.flush()


def main() -> None:
    import torch

    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--model", default="llama8b" if gpus else "tiny", help="a file of conf/model")
    parser.add_argument("--length", type=int, default=8192 if gpus else 64, help="tokens of the longest row")
    parser.add_argument(
        "--rows", default="1,2", help="micro batches to try in a full fine-tune, in rows of --length tokens"
    )
    parser.add_argument("--gpus", type=int, default=gpus or 2)
    parser.add_argument("--stored", type=Path, help="folder of the base model for adapters; written if it is missing")
    parser.add_argument("--limit", type=float, default=240, help="longest time of one run or loop in seconds")
    parser.add_argument("--with", dest="extra", default="cluster=local", help="more overrides for launch.py")
    parser.add_argument("--out", type=Path, default=Path("train_speed.json"), help="file for all results, as JSON")
    options = parser.parse_args()
    options.extra = options.extra.split()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpus else "cpu", "gpus": options.gpus}
    with tempfile.TemporaryDirectory(prefix="train-speed-") as scratch:
        for name in options.cases.split(","):
            results[name] = measure(name, CASES[name], options, Path(scratch) / name)
            options.out.write_text(json.dumps(results, indent=1))
    # rows of many lengths are compared with rows of equal length, not with a loop
    if "packed" in results and "fsdp" in results:
        pair = [results[name].get("tokens_per_s_per_rank") for name in ("packed", "fsdp")]
        results["packed"]["ratio"] = round(pair[0] / pair[1], 3) if all(pair) else None
        options.out.write_text(json.dumps(results, indent=1))
    ratios = {name: one.get("ratio") for name, one in results.items() if isinstance(one, dict)}
    print("RESULT", json.dumps({"device": results["device"], "gpus": options.gpus, **ratios}))


if __name__ == "__main__":
    main()
