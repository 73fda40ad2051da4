"""Times a dry run of launch.py (70B on Slurm) and compares it with `import hydra, submitit` alone in the same Python.

    python benchmarks/launch_latency.py [rounds]

Both are timed as whole processes, one after the other in each round. The last line is RESULT with the median seconds of both
and the median over rounds of their ratio.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent
DRY_RUN = ["launch.py", "cluster=slurm", "model=llama70b", "parallel=zero3", "dry_run=true"]
BARE = ["-c", "import hydra, submitit"]


def seconds(words: list[str]) -> float:
    """Run Python with these arguments to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=CLONE, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def measure(name: str, words: list[str], rounds: int) -> None:
    """Time a command against the bare import, and print the figures."""
    commands = {name: words, "bare": BARE}
    for command in commands.values():
        seconds(command)  # not counted: fills the page cache and writes the bytecode
    pairs = [{key: seconds(command) for key, command in commands.items()} for _ in range(rounds)]
    for key in commands:
        times = sorted(pair[key] for pair in pairs)
        print(f"{key:<8} min {times[0]:.3f}  median {statistics.median(times):.3f}  max {times[-1]:.3f} s")
    medians = {f"{key}_s": round(statistics.median(pair[key] for pair in pairs), 3) for key in commands}
    ratio = round(statistics.median(pair[name] / pair["bare"] for pair in pairs), 2)
    print("RESULT", json.dumps({"rounds": rounds, "vs_bare": ratio, **medians}))


if __name__ == "__main__":
    measure("dry_run", DRY_RUN, int(sys.argv[1]) if len(sys.argv) > 1 else 15)
