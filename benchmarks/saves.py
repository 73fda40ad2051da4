"""Measures what a checkpoint costs training: background saves compared with blocking saves, and the resume.

    python benchmarks/saves.py [--model llama8b] [--gpus N] [--folder DIR] [--parallel fsdp] [--steps N] [--alone] [--keep]

A run through launch.py, a full fine-tune with AdamW, saves after --steps steps (12 bytes per parameter: 96 GB for 8B), and goes on.
The host memory for the copy is allocated before the save, during training. On a machine whose memory grows while it is used, set
--steps high enough for that.

    blocked_s   how much later the next step came
    write_s     how long writing to the disk took
    slowed      median step time during the write, divided by the median before it
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import runs  # noqa: E402

LENGTH = 2048
SAVED = re.compile(r"saved +step-\d+: ([\d.e+]+) GB in ([\d.]+) s \(([\d.]+) GB/s\), training waited")
RESUMED = re.compile(r"resumed from .*, ([\d.e+]+) GB in ([\d.]+) s \(([\d.]+) GB/s\)")


def overrides(options: argparse.Namespace, scratch: Path, in_background: bool) -> list[str]:
    return [
        f"model={options.model}", "model.init=random", f"model.tokenizer={scratch / 'tokenizer'}", "pipeline=train",
        "data=jsonl", f"data.path={scratch / 'rows.jsonl'}", f"data.max_length={LENGTH}", "data.validation_fraction=0.02",
        "cluster=local", f"cluster.train.ranks_per_node={options.gpus}", f"parallel={options.parallel}", "train.steps=1000",
        f"train.global_batch={4 * options.gpus}", f"train.save_every={options.steps}", "train.eval_every=0",
        "train.keep_checkpoints=1", f"train.async_save={str(in_background).lower()}",
    ]  # fmt: skip


def measure_save(options: argparse.Namespace, scratch: Path, in_background: bool) -> tuple[dict[str, Any], Path]:
    """Train until the first checkpoint is published; returns the measurements and the run folder."""
    folder = scratch / ("together" if in_background else "waiting")
    arguments = [f"run_dir={folder}", *overrides(options, scratch, in_background)]

    def is_saved(run: runs.Run) -> bool:
        return SAVED.search(run.text()) is not None and run.steps()[-1]["step"] > options.steps

    with runs.muster(folder, arguments, is_saved, 600) as run:
        steps, match = {step["step"]: step for step in run.steps()}, SAVED.search(run.text())
    assert match is not None
    size, write, rate = (float(value) for value in match.groups())
    last, step_s = options.steps, statistics.median(steps[step]["seconds"] for step in range(3, options.steps + 1))
    begun = steps[last + 1]["time"]
    blocked = begun - steps[last]["time"] - step_s
    during = [
        step["seconds"] for number, step in steps.items() if last < number <= 2 * last and step["time"] < begun + write
    ]
    return {
        "gb": size, "write_s": write, "gb_per_s": rate, "blocked_s": round(blocked, 2), "step_s": step_s,
        "slowed": round(statistics.median(during) / step_s, 3) if in_background else None, "steps": len(during),
    }, folder  # fmt: skip


def measure_resume(folder: Path) -> dict[str, float]:
    with runs.muster(folder, [f"resume={folder}"], lambda run: RESUMED.search(run.text()) is not None, 600) as run:
        match = RESUMED.search(run.text())
    assert match is not None
    return {"resume_s": float(match[2]), "resume_gb_per_s": float(match[3])}


def main() -> None:
    import torch

    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama8b" if gpus else "tiny", help="name of a file in conf/model")
    parser.add_argument("--gpus", type=int, default=gpus or 2)
    parser.add_argument("--parallel", default="fsdp")
    parser.add_argument("--steps", type=int, default=40, help="steps before the checkpoint")
    parser.add_argument("--alone", action="store_true", help="measure the background save only")
    parser.add_argument("--folder", type=Path, help="folder for the runs and their checkpoints")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the folder of the resumed run, to consolidate it",
    )
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.folder, prefix="saves-"))
    vocabulary = runs.architecture(options.model)["vocab_size"]
    runs.write_tokenizer(scratch / "tokenizer", vocabulary)
    runs.write_rows(scratch / "rows.jsonl", vocabulary, [LENGTH if gpus else 64] * 512)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpus else "cpu", "gpus": options.gpus}
    if not options.alone:
        results["waiting"], folder = measure_save(options, scratch, in_background=False)
        print("waiting", json.dumps(results["waiting"]), flush=True)
        shutil.rmtree(folder)  # disk space for the next run
    results["together"], folder = measure_save(options, scratch, in_background=True)
    print("together", json.dumps(results["together"]), flush=True)
    results |= measure_resume(folder)
    if options.keep:
        print(f"kept      {folder}")
    else:
        shutil.rmtree(scratch)
    print("RESULT", json.dumps({"blocked_s": results["together"]["blocked_s"], **results}))


if __name__ == "__main__":
    main()
