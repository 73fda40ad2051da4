"""Trains models larger than one GPU for a few steps, and compares the peak memory of a rank with the estimate.

    python benchmarks/size.py [--model llama70b] [--gpus N] [--cases fsdp_lora,zero3_lora,...] [--folder DIR] [--with "..."]

Cases with an adapter load a random model, which is first written to --folder (141 GB for 70B in bf16; /dev/shm is fine). A full
fine-tune initializes its weights at random instead. Muster chooses all settings except layout, adapter and optimizer. `ratio`
is the estimate that the launch prints, divided by the peak memory of torch's tensors on any rank; both without the CUDA
context. Without GPUs, a tiny model is trained on CPUs to try the benchmark itself.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import runs  # noqa: E402

CASES = {
    "fsdp_lora": ["parallel=fsdp", "adapter=lora"],
    "zero3_lora": ["parallel=zero3", "adapter=lora"],
    "fsdp_8bit": ["parallel=fsdp", "train.optimizer=adamw_8bit"],
    "lora_float8": ["parallel=ddp", "adapter=lora_float8"],
    "qlora": ["parallel=ddp", "adapter=qlora"],
}
ESTIMATE = re.compile(r"^memory +train: ([\d.]+) (?:.*context ([\d.]+))?", re.MULTILINE)


def measure(name: str, options: argparse.Namespace, scratch: Path, model: Path) -> dict[str, Any]:
    """Run a case to its last step. Returns its estimate, its peak memory, and the seconds of its last step."""
    folder = scratch / name
    if "lora" in name:
        source = ["model.init=pretrained", f"model.source={model}"]
    else:
        source = ["model.init=random", f"model.tokenizer={model}"]
    overrides = [
        f"run_dir={folder}", f"model={options.model}", *source, *CASES[name], "pipeline=train", "data=jsonl",
        f"data.path={scratch / 'rows.jsonl'}", f"data.max_length={options.length}", "data.validation_fraction=0.02",
        f"train.steps={options.steps}", f"train.global_batch={options.gpus}", f"train.log_every={options.steps // 2}",
        "train.eval_every=0", "train.save_every=0", f"cluster.train.ranks_per_node={options.gpus}", *options.extra,
    ]  # fmt: skip
    with runs.muster(folder, overrides, lambda run: len(run.steps()) >= options.steps, options.limit) as run:
        steps, log = run.steps(), run.text()
    match = ESTIMATE.search(log)
    assert match, log
    estimated = float(match[1]) - float(match[2] or 0)
    low, high = (steps[-1][f"memory_gib_{end}"] for end in ("min", "max"))
    return {
        "estimate_gib": round(estimated, 1), "gib_min": low, "gib_max": high, "ratio": round(estimated / high, 2),
        "step_s": steps[-1]["seconds"], "loss": [steps[0]["loss"], steps[-1]["loss"]],
        "chosen": re.findall(r"^chosen +(.*?):", log, re.MULTILINE),
    }  # fmt: skip


def main() -> None:
    import torch

    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama70b" if gpus else "tiny", help="a file of conf/model")
    parser.add_argument("--gpus", type=int, default=gpus or 2)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--length", type=int, default=4096 if gpus else 64, help="tokens per row")
    parser.add_argument("--steps", type=int, default=20, help="steps of training; more than the 10 warmup steps")
    parser.add_argument("--limit", type=float, default=300, help="longest time of a case in seconds")
    parser.add_argument("--folder", type=Path, help="where to write the model")
    parser.add_argument(
        "--stored", default="bfloat16", help="dtype of the model's files; float8_e4m3fn needs half the space"
    )
    parser.add_argument("--with", dest="extra", default="cluster=local", help="more overrides for launch.py")
    options = parser.parse_args()
    options.extra = options.extra.split()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpus else "cpu", "gpus": options.gpus}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="size-") as temporary:
        scratch, vocabulary = Path(temporary), runs.architecture(options.model)["vocab_size"]
        model = runs.write_tokenizer(scratch / "model", vocabulary)
        if "lora" in options.cases:
            runs.write_model(model, options.model, options.stored)
        runs.write_rows(scratch / "rows.jsonl", vocabulary, [options.length] * options.gpus * (options.steps + 4))
        for name in options.cases.split(","):
            try:
                results[name] = measure(name, options, scratch, model)
            except RuntimeError as error:
                results[name] = {"error": str(error)[-600:]}
            print(name, json.dumps(results[name]), flush=True)
    print("RESULT", json.dumps(results))


if __name__ == "__main__":
    main()
