"""Training through launch.py beside loops written by hand and transformers.Trainer, on this machine's GPUs, in one call.

    python benchmarks/train_speed.py [--cases fsdp,zero3,float8,packed,lora,qlora,lora_float8] [--gpus N] [--with "..."]

Muster is told the model, the layout and the adapter, and on Slurm by `--with "cluster=slurm ..."` what a site says (there also
`cluster.train.gpu_memory_gib`); what it recomputes, how many rows it takes at once, kernels and compilation are its own choice.
The loops (benchmarks/loops.py) are tuned by hand. Tokens/s are of one GPU, the median of the steps after the fourth; `ratio` is
Muster's to the best loop's of the same case. Without GPUs it rehearses itself at a tiny size, and its figures mean nothing. Each
case is written to `--out` when it is done.
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

WARM, STEPS = 4, 12


@dataclass(frozen=True)
class Case:
    words: list[str]
    """Of Muster's command line."""
    loops: list[list[str]]
    """What it is compared with, at each number of rows that a GPU takes in a step."""
    alone: bool = False
    """On one GPU."""
    length: int = 8192
    ragged: bool = False
    stored: bool = False
    """The model is read from files: quantised weights cannot be drawn, and frozen ones are drawn on one core."""


CASES = {
    "fsdp": Case(["parallel=fsdp"], [["fsdp"], ["trainer"], ["trainer", "--tuned"]]),
    "zero3": Case(["parallel=zero3"], [["zero3"]]),
    "float8": Case(["parallel=fsdp", "train.float8=tensorwise"], [["fsdp", "--float8", "tensorwise"]]),
    "packed": Case(["parallel=fsdp", "data.packing=true"], [], ragged=True),
    "lora": Case(["parallel=ddp", "adapter=lora"], [["lora"]], alone=True, length=4096, stored=True),
    "qlora": Case(["parallel=ddp", "adapter=qlora"], [["qlora"]], alone=True, length=4096, stored=True),
    "lora_float8": Case(
        ["parallel=ddp", "adapter=lora_float8"],
        [["lora"], ["lora", "--float8", "tensorwise"]],
        alone=True,
        length=4096,
        stored=True,
    ),
}


def visible(case: Case) -> dict[str, str]:
    """The environment in which a case sees the GPUs that it is for."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]} if case.alone else {}


def rows(case: Case, options: argparse.Namespace) -> list[int]:
    """That a GPU may take in a step: the loops try each, Muster is told the most of them."""
    return [4] if case.alone else [int(count) for count in options.rows.split(",")]


def ours(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run of a case; without its checkpoint, which is of no use here."""
    words = runs.architecture(options.model)["vocab_size"]
    count = 1 if case.alone else options.gpus
    length, batch = min(case.length, options.length), rows(case, options)[-1] * count
    tokens = length * batch * (STEPS + 2)
    lengths = runs.ragged(length, tokens) if case.ragged else [length] * (tokens // length)
    data = runs.write_rows(folder / "rows.jsonl", words, lengths)
    model = ["model.init=random", f"model.tokenizer={folder / 'tokenizer'}"]
    if case.stored:
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
            "train.save_every=0", f"cluster.train.ranks_per_node={count}", *case.words, *options.extra,
        ],
        lambda run: len(run.steps()) >= STEPS,
        options.limit,
        visible(case),
    ) as run:  # fmt: skip
        found = run.steps()[:STEPS]
        log = run.text()
    chosen = [line for line in log.splitlines() if line.startswith(("chosen", "attention", "estimate"))]
    timed = found[WARM:]
    return {
        "tokens_per_s_per_rank": statistics.median(line["tokens_per_s_per_rank"] for line in timed),
        "mfu": statistics.median(line.get("mfu", 0) for line in timed),
        "gib": max(line.get("memory_gib_max", 0) for line in found),
        "first_step_s": found[0]["seconds"],
        "chosen": chosen,
    }


def loop(words: list[str], case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """A loop by hand, in processes of its own; with `error` where it does not run (out of memory, say)."""
    count = 1 if case.alone else options.gpus
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if not case.alone else []
    command = [
        sys.executable, *start, str(ROOT / "benchmarks/loops.py"), *words, "--shape", options.model,
        "--length", str(min(case.length, options.length)), "--steps", str(STEPS),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=options.limit,
            env=os.environ | visible(case),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"loop": " ".join(words), "error": f"longer than {options.limit} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    lines = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line] or [
        done.stderr[-500:]
    ]
    return {"loop": " ".join(words), "error": lines[-1][-300:]}


def measured(name: str, case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    runs.write_tokenizer(folder / "tokenizer", runs.architecture(options.model)["vocab_size"])
    loops = [
        loop([*words, "--micro-batch", str(count)], case, options)
        for words in case.loops
        for count in rows(case, options)
    ]
    try:
        found = ours(case, options, folder)
    except RuntimeError as error:
        print(f"{name}: {error}", flush=True)
        return {"error": str(error)[-500:], "loops": loops}
    best = max((one["tokens_per_s_per_rank"] for one in loops if "error" not in one), default=None)
    result = {"ratio": round(found["tokens_per_s_per_rank"] / best, 3) if best else None, **found, "loops": loops}
    show(name, result)
    return result


def show(name: str, result: dict[str, Any]) -> None:
    def line(who: str, one: dict[str, Any]) -> str:
        if "error" in one:
            return f"  {who:<28} {one['error'][:90]}"
        peak = f"{one['gib']:6.1f} GiB" if one.get("gib") else ""
        return f"  {who:<28} {one['tokens_per_s_per_rank']:9,.0f} tok/s a GPU  {one['mfu']:6.1%}  {peak}"

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
    parser.add_argument("--length", type=int, default=8192 if gpus else 64, help="longest row, in tokens")
    parser.add_argument(
        "--rows", default="1,2", help="of --length tokens that a GPU may take in a step of a full fine-tune"
    )
    parser.add_argument("--gpus", type=int, default=gpus or 2)
    parser.add_argument(
        "--stored", type=Path, help="folder of the model that adapters are put on; made where it is missing"
    )
    parser.add_argument("--limit", type=float, default=240, help="seconds that one side may take")
    parser.add_argument("--with", dest="extra", default="cluster=local", help="further words for launch.py")
    parser.add_argument("--out", type=Path, default=Path("train_speed.json"))
    options = parser.parse_args()
    options.extra = options.extra.split()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpus else "cpu", "gpus": options.gpus}
    with tempfile.TemporaryDirectory(prefix="train-speed-") as scratch:
        for name in options.cases.split(","):
            found[name] = measured(name, CASES[name], options, Path(scratch) / name)
            options.out.write_text(json.dumps(found, indent=1))
    if "packed" in found and "fsdp" in found:
        pair = [found[name].get("tokens_per_s_per_rank") for name in ("packed", "fsdp")]
        found["packed"]["ratio"] = round(pair[0] / pair[1], 3) if all(pair) else None
        options.out.write_text(json.dumps(found, indent=1))
    ratios = {name: one.get("ratio") for name, one in found.items() if isinstance(one, dict)}
    print("RESULT", json.dumps({"device": found["device"], "gpus": options.gpus, **ratios}))


if __name__ == "__main__":
    main()
