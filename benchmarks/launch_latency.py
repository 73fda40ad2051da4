"""Times what a person types on the login node, and compares it with `import hydra, submitit` alone in the same Python.

    python benchmarks/launch_latency.py [rounds]

A dry run of launch.py (70B on Slurm), both kinds of help, `status`, and `ls` of 500 runs of five jobs, which are written for this.
All are timed as whole processes, one after the other in each round. The last line is RESULT with the median seconds of each and
the median over rounds of its ratio to the bare imports.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent
BARE = ["-c", "import hydra, submitit"]
RUNS = 500
JOBS = ("preprocess", "train", "consolidate", "evaluate", "generate")
STEPS = 200


def write_run(run: Path, minute: int) -> None:
    """Write what `ls` and `status` read of a run that has completed on this machine."""
    ids = {job: "999999999" for job in JOBS}
    launch = {"command": [], "time": f"2026-11-30T10:{minute % 60:02}:00+0000", "cluster": "local", "jobs": ids}
    for job in JOBS:
        folder = run / "jobs" / job
        (folder / "attempt-1").mkdir(parents=True)
        times = {"started": 1.0, "ended": 61.0, "job_id": "1", "host": "n1"}
        verdict = {"status": "completed", "reason": "", "rank": 0, "step": STEPS, **times}
        (folder / "attempt-1/begin.json").write_text(json.dumps(times))
        (folder / "attempt-1.json").write_text(json.dumps(verdict))
    jobs = "".join(f"- {job}\n" for job in JOBS)
    (run / "config.yaml").write_text(f"run_dir: {run}\njobs:\n{jobs}train:\n  steps: {STEPS}\n")
    lines = (
        {"step": step, "loss": 7 - step / 100, "grad_norm": 1.0, "tokens_per_s": 4000.0, "left_s": 0, "time": 61.0}
        for step in range(1, STEPS + 1)
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "run.json").write_text(json.dumps({"launches": [launch]}))


def commands(runs: Path) -> dict[str, list[str]]:
    """What is timed, as words after `python`."""
    return {
        "bare": BARE,
        "dry_run": ["launch.py", "cluster=slurm", "model=llama70b", "parallel=zero3", "dry_run=true"],
        "run_help": ["launch.py", "--help"],
        "help": ["-m", "launcher", "--help"],
        "status": ["-m", "launcher", "status", str(runs / "0")],
        "ls": ["-m", "launcher", "ls", str(runs)],
    }


def seconds(words: list[str]) -> float:
    """Run a command to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=CLONE, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def measure(timed: dict[str, list[str]], rounds: int, **also: object) -> None:
    """Time commands against the one that is called `bare`, in turn, and print the figures; `also` goes into the RESULT line."""
    for words in timed.values():
        seconds(words)  # not counted: fills the page cache and writes the bytecode
    taken = [{name: seconds(words) for name, words in timed.items()} for _ in range(rounds)]
    result: dict[str, object] = {"rounds": rounds, **also}
    for name in timed:
        times = sorted(each[name] for each in taken)
        ratio = statistics.median(each[name] / each["bare"] for each in taken)
        median = statistics.median(times)
        print(f"{name:<8} min {times[0]:.3f}  median {median:.3f}  max {times[-1]:.3f} s  {ratio:.2f} x bare")
        result |= {f"{name}_s": round(median, 3), f"{name}_vs_bare": round(ratio, 2)}
    print("RESULT", json.dumps(result))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as folder:
        for number in range(RUNS):
            write_run(Path(folder) / str(number), number)
        measure(commands(Path(folder)), rounds, runs=RUNS)


if __name__ == "__main__":
    main()
