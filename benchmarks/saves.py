"""What a checkpoint costs training: asynchronous beside synchronous saves, and the resume, of a run through launch.py.

    python benchmarks/saves.py [--model llama8b] [--gpus N] [--folder DIR] [--parallel fsdp] [--steps N] [--alone] [--keep]

A full fine-tune with AdamW saves after --steps steps (12 bytes a parameter: 96 GB with 8B) and goes on. Host memory for the
copy is taken meanwhile: a machine whose memory grows as it is used needs steps enough for that. `blocked_s` is by how much
later the next step came, `write_s` how long the disk took, `slowed` the median step meanwhile to the median step before.
The asynchronous one is then resumed: `resume_s` is reading it alone. Without GPUs it rehearses itself at a tiny size.
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
SAVED = re.compile(r"^saved .*?: ([\d.e+]+) GB in ([\d.]+) s \(([\d.]+) GB/s\), training waited", re.MULTILINE)
RESUMED = re.compile(r"^resumed .*, ([\d.e+]+) GB in ([\d.]+) s \(([\d.]+) GB/s\)", re.MULTILINE)


def words(options: argparse.Namespace, scratch: Path, together: bool) -> list[str]:
    return [
        f"model={options.model}", "model.init=random", f"model.tokenizer={scratch / 'tokenizer'}", "pipeline=train",
        "data=jsonl", f"data.path={scratch / 'rows.jsonl'}", f"data.max_length={LENGTH}", "data.validation_fraction=0.02",
        "cluster=local", f"cluster.train.ranks_per_node={options.gpus}", f"parallel={options.parallel}", "train.steps=1000",
        f"train.global_batch={4 * options.gpus}", f"train.save_every={options.steps}", "train.eval_every=0",
        "train.keep_checkpoints=1", f"train.async_save={str(together).lower()}",
    ]  # fmt: skip


def one(options: argparse.Namespace, scratch: Path, together: bool) -> tuple[dict[str, Any], Path]:
    """A run until its first checkpoint is whole."""
    folder = scratch / ("together" if together else "waiting")
    line = [f"run_dir={folder}", *words(options, scratch, together)]

    def told(run: runs.Run) -> bool:
        return SAVED.search(run.text()) is not None and run.steps()[-1]["step"] > options.steps

    with runs.muster(folder, line, told, 600) as run:
        found, said = {step["step"]: step for step in run.steps()}, SAVED.search(run.text())
    assert said is not None
    size, write, rate = (float(value) for value in said.groups())
    last, step_s = options.steps, statistics.median(found[step]["seconds"] for step in range(3, options.steps + 1))
    begun = found[last + 1]["time"]
    blocked = begun - found[last]["time"] - step_s
    during = [
        step["seconds"] for number, step in found.items() if last < number <= 2 * last and step["time"] < begun + write
    ]
    return {
        "gb": size, "write_s": write, "gb_per_s": rate, "blocked_s": round(blocked, 2), "step_s": step_s,
        "slowed": round(statistics.median(during) / step_s, 3) if together else None, "steps": len(during),
    }, folder  # fmt: skip


def resume(folder: Path) -> dict[str, float]:
    with runs.muster(folder, [f"resume={folder}"], lambda run: RESUMED.search(run.text()) is not None, 600) as run:
        said = RESUMED.search(run.text())
    assert said is not None
    return {"resume_s": float(said[2]), "resume_gb_per_s": float(said[3])}


def main() -> None:
    import torch

    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama8b" if gpus else "tiny", help="a file of conf/model")
    parser.add_argument("--gpus", type=int, default=gpus or 2)
    parser.add_argument("--parallel", default="fsdp")
    parser.add_argument("--steps", type=int, default=40, help="before a checkpoint")
    parser.add_argument("--alone", action="store_true", help="leave out the synchronous save")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    parser.add_argument("--keep", action="store_true", help="leave the resumed run's folder, to merge it")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.folder, prefix="saves-"))
    vocabulary = runs.architecture(options.model)["vocab_size"]
    runs.write_tokenizer(scratch / "tokenizer", vocabulary)
    runs.write_rows(scratch / "rows.jsonl", vocabulary, [LENGTH if gpus else 64] * 512)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpus else "cpu", "gpus": options.gpus}
    if not options.alone:
        found["waiting"], folder = one(options, scratch, together=False)
        print("waiting", json.dumps(found["waiting"]), flush=True)
        shutil.rmtree(folder)  # room for the next
    found["together"], folder = one(options, scratch, together=True)
    print("together", json.dumps(found["together"]), flush=True)
    found |= resume(folder)
    if options.keep:
        print(f"kept      {folder}")
    else:
        shutil.rmtree(scratch)
    print("RESULT", json.dumps({"blocked_s": found["together"]["blocked_s"], **found}))


if __name__ == "__main__":
    main()
