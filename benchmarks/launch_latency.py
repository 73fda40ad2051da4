"""Whole-process seconds of the mission command's dry run, in turn with a bare `import hydra, submitit` of the same Python.

    python benchmarks/launch_latency.py [rounds]

The last line is RESULT with medians and the median of the ratios, pair by pair.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent
COMMANDS = {
    "dry_run": ["launch.py", "cluster=slurm", "model=llama70b", "parallel=zero3", "dry_run=true"],
    "bare": ["-c", "import hydra, submitit"],
}


def seconds(name: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *COMMANDS[name]], cwd=CLONE, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    for name in COMMANDS:
        seconds(name)  # warm the page cache and the bytecode
    pairs = [{name: seconds(name) for name in COMMANDS} for _ in range(rounds)]
    for name in COMMANDS:
        taken = sorted(pair[name] for pair in pairs)
        print(f"{name:<8} min {taken[0]:.3f}  median {statistics.median(taken):.3f}  max {taken[-1]:.3f} s")
    figures = {f"{name}_s": round(statistics.median(pair[name] for pair in pairs), 3) for name in COMMANDS}
    ratio = round(statistics.median(pair["dry_run"] / pair["bare"] for pair in pairs), 2)
    print("RESULT", json.dumps({"rounds": rounds, "vs_bare": ratio, **figures}))


if __name__ == "__main__":
    main()
