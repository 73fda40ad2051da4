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
COMMANDS = {
    "dry_run": ["launch.py", "cluster=slurm", "model=llama70b", "parallel=zero3", "dry_run=true"],
    "bare": ["-c", "import hydra, submitit"],
}


def seconds(name: str) -> float:
    """Run one of COMMANDS to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *COMMANDS[name]], cwd=CLONE, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    for name in COMMANDS:
        seconds(name)  # not counted: fills the page cache and writes the bytecode
    pairs = [{name: seconds(name) for name in COMMANDS} for _ in range(rounds)]
    for name in COMMANDS:
        times = sorted(pair[name] for pair in pairs)
        print(f"{name:<8} min {times[0]:.3f}  median {statistics.median(times):.3f}  max {times[-1]:.3f} s")
    medians = {f"{name}_s": round(statistics.median(pair[name] for pair in pairs), 3) for name in COMMANDS}
    ratio = round(statistics.median(pair["dry_run"] / pair["bare"] for pair in pairs), 2)
    print("RESULT", json.dumps({"rounds": rounds, "vs_bare": ratio, **medians}))


if __name__ == "__main__":
    main()
