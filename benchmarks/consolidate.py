"""Times consolidation and the tools of other projects on the same random checkpoints of four ranks, cache cold and warm.

    python benchmarks/consolidate.py [--size 1.5b|0.5b|3b|6b|tiny] [--folder DIR] [--rounds N] [--skip torch,...] [--save FILE]
    python benchmarks/consolidate.py --save FILE --plot docs/merge.svg       draw memory and time against size, from FILE

Every tool runs in its own process. It is timed from its start until its bytes are on the disk (`sync`), so that no tool leaves
its writes to the next one. Peak memory is anonymous memory (RssAnon), sampled every 10 ms; the kernel can take back pages of files.
accelerate, torch and zero_to_fp32 write fp32, so Muster does too when compared with them. Axolotl's way (the whole state in memory,
cast, saved in 5 GB files) writes bf16. `copy` reads the same bytes, writes as many as the bf16 model has and flushes them, with as
many threads as Muster: it shows what the disk allows.

disk_share is the time of `copy` as a share of Muster's in bf16, both without interpreter start and imports. disk_share_verified
also counts reading the result back. disk_share_whole is from process start to process end. ZeRO's files also hold
two moments, which makes three times the bytes: tools that map or load them take longer. torch's HF consolidation reads shards that
HuggingFaceStorageWriter made of the same weights. Ratios are medians over rounds; of cold and warm, the smaller ratio counts.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.checkpoints import SHAPES, write_sources  # noqa: E402

SIDES = ("copy", "ours_bf16", "axolotl", "ours_fp32", "accelerate", "torch", "ours_zero", "zero_to_fp32")
SOURCES = {"torch": "hf", "ours_zero": "zero", "zero_to_fp32": "zero"}


def run_side(name: str, folder: Path, out: Path, workers: int) -> None:
    """Run one tool in this process."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    if name.startswith("ours"):
        from jobs.consolidation import external

        kind, dtype = ("zero", "fp32") if name == "ours_zero" else ("dcp", name.removeprefix("ours_"))
        arguments = [folder / kind, "--out", out, "--base", folder / "base", "--dtype", dtype, "--workers", workers]
        external.main([str(argument) for argument in arguments])
    else:
        sides = {"axolotl": axolotl, "accelerate": accelerate, "torch": torch_hf, "zero_to_fp32": zero_to_fp32}
        copy(folder, out, workers) if name == "copy" else sides[name](folder, out)


def copy(folder: Path, out: Path, workers: int) -> None:
    """Read everything, write half of it, flush; in large chunks, with as many threads as Muster."""
    out.mkdir()
    began = time.perf_counter()

    def one(path: Path) -> None:
        buffer = bytearray(16 * 2**20)
        with path.open("rb", buffering=0) as source, (out / path.name).open("wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(memoryview(buffer)[: count // 2])
            os.fsync(target.fileno())

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, sorted((folder / "dcp").glob("*.distcp"))))
    print(f"moved in {time.perf_counter() - began:.3f} s")


def _whole(folder: Path) -> dict[str, Any]:
    """Read the whole state with torch's reader, as accelerate and axolotl do."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(
        state, storage_reader=dcp.FileSystemReader(folder / "dcp"), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return state["model"]


def axolotl(folder: Path, out: Path) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict

    out.mkdir()
    state = {name: value.to(torch.bfloat16) for name, value in _whole(folder).items()}
    save_torch_state_dict(state, out, max_shard_size="5GB")


def accelerate(folder: Path, out: Path) -> None:
    from accelerate.utils import merge_fsdp_weights

    merge_fsdp_weights(str(folder / "dcp"), str(out))


def torch_hf(folder: Path, out: Path) -> None:
    """With one thread for each of the two files, which is the most that it can use."""
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    out.mkdir()
    names = json.loads((folder / "base/names.json").read_text())
    half = len(names) // 2
    index = {name: 1 + (number >= half) for number, name in enumerate(names)}
    consolidate_safetensors_files(str(folder / "hf"), str(out), fqn_to_index_mapping=index, num_threads=2)


def zero_to_fp32(folder: Path, out: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(str(folder / "zero"), str(out), safe_serialization=True)


def cold(folder: Path) -> None:
    """Take the sources out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warm(folder: Path) -> None:
    """Read the sources into the page cache, as far as memory allows."""
    os.sync()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                buffer = bytearray(2**24)
                while file.readinto(buffer):
                    pass


def measure(name: str, folder: Path, out: Path, workers: int) -> dict[str, float]:
    """Seconds until all bytes are on disk, peak anonymous memory, and the seconds that the tool itself reports."""
    from benchmarks.runs import resident  # not at the top: every timed process would import numpy

    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        command = [sys.executable, __file__, "--side", name, "--folder", str(folder), "--out", str(out)]
        with subprocess.Popen([*command, "--workers", str(workers)], stdout=log, stderr=log, cwd=ROOT) as run:
            peak = 0
            while run.poll() is None:
                peak = max(peak, resident(run.pid, "RssAnon:"))
                time.sleep(0.01)
        os.sync()
        seconds = time.perf_counter() - began
        log.seek(0)
        text = log.read()
    if run.returncode:
        raise RuntimeError(f"{name}: {text[-2000:]}")
    tokens = text.replace(",", " ").split()
    own = [
        float(tokens[at + 1]) for at, word in enumerate(tokens[:-2]) if word == "in" and tokens[at + 2] in ("s", "s\n")
    ]
    shutil.rmtree(out, ignore_errors=True)
    return {"s": seconds, "mib": peak / 2**20, "own_s": own[0] if own else seconds, "checked_s": sum(own[:2])}


def measure_all(folder: Path, rounds: int, sides: list[str], workers: int) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        for state in (cold, warm):
            for name in sides:
                state(folder / SOURCES.get(name, "dcp"))
                one = measure(name, folder, folder / "out", workers)
                results.setdefault(f"{name} {state.__name__}", []).append(one)
                shown = f"{one['s']:7.2f} s  {one['own_s']:7.2f} s inside  {one['mib']:7.0f} MiB"
                print(f"{number + 1} {name:<12} {state.__name__:<4} {shown}", flush=True)
    return results


def smaller_ratio(
    results: dict[str, list[dict[str, float]]], other: str, ours: str, key: str = "s", own: str = "s"
) -> float | None:
    """The smaller of the cold and the warm ratio, each a median over rounds."""
    if f"{other} cold" not in results:
        return None
    return round(
        min(
            statistics.median(
                theirs[key] / max(mine[own], 0.01)
                for theirs, mine in zip(results[f"{other} {state}"], results[f"{ours} {state}"], strict=True)
            )
            for state in ("cold", "warm")
        ),
        2,
    )


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw seconds and anonymous memory against parameters, for every tool that was measured at more than one size."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "muster"  # so that the same figures give the same file
    from matplotlib import pyplot

    sizes = sorted(results, key=lambda size: float(size.rstrip("b")))
    picture, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, key, unit in zip(
        panels, ("seconds", "mib"), ("seconds, page cache cold", "MiB of anonymous memory"), strict=True
    ):
        for name in SIDES:
            points = [
                (float(size.rstrip("b")), results[size][key][f"{name} cold"])
                for size in sizes
                if f"{name} cold" in results[size][key]
            ]
            if len(points) > 1:
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="billion parameters", ylabel=unit)
        panel.set_xticks([float(size.rstrip("b")) for size in sizes], [size.rstrip("b") for size in sizes], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    picture.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written (needs 12 bytes per parameter, 28 with ZeRO)"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--skip", default="", help=f"tools to leave out, of {','.join(SIDES)}")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--save", type=Path, help="JSON file to which the result of this size is added")
    parser.add_argument(
        "--plot", type=Path, help="only draw the results in --save into this file (pip install matplotlib)"
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.folder, options.out, options.workers)
        return
    if options.plot:
        draw(json.loads(options.save.read_text()), options.plot)
        return
    sides = [name for name in SIDES if name not in options.skip.split(",")]
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="consolidate-") as scratch:
        folder = Path(scratch) / "checkpoints"
        write_sources(folder, options.size, any("zero" in name for name in sides), "torch" in sides)
        results = measure_all(folder, options.rounds, sides, options.workers)
    peaks = [one["mib"] for name, every in results.items() if name.startswith("ours") for one in every]
    result = {
        "size": options.size,
        "vs_accelerate": smaller_ratio(results, "accelerate", "ours_fp32"),
        "vs_accelerate_bf16": smaller_ratio(results, "accelerate", "ours_bf16"),
        "vs_axolotl": smaller_ratio(results, "axolotl", "ours_bf16"),
        "vs_torch": smaller_ratio(results, "torch", "ours_fp32"),
        "vs_zero_to_fp32": smaller_ratio(results, "zero_to_fp32", "ours_zero"),
        "disk_share": smaller_ratio(results, "copy", "ours_bf16", "own_s", "own_s"),
        "disk_share_verified": smaller_ratio(results, "copy", "ours_bf16", "own_s", "checked_s"),
        "disk_share_whole": smaller_ratio(results, "copy", "ours_bf16"),
        "peak_mib": round(max(peaks)),
        "seconds": {name: round(statistics.median(one["s"] for one in every), 2) for name, every in results.items()},
        "mib": {name: round(max(one["mib"] for one in every)) for name, every in results.items()},
    }
    if options.save:
        kept = json.loads(options.save.read_text()) if options.save.exists() else {}
        options.save.write_text(json.dumps(kept | {options.size: result}, indent=1) + "\n")
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
