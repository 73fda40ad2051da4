"""Times `muster compare` of 20 runs and compares it with `import hydra, submitit` alone, as launch_latency.py does.

    python benchmarks/compare_latency.py [rounds] [steps of each run]

The runs have 1000 steps if nothing else is said, and the config that a launch writes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import launch_latency

RUNS = 20


def write_run(folder: Path, config: str, steps: int, rate: float) -> None:
    """A run folder with what compare reads."""
    attempt = folder / "jobs/train/attempt-1"
    attempt.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.replace("learning_rate: 2.0e-05", f"learning_rate: {rate}"))
    verdict = {"status": "completed", "started": 1e9, "ended": 1e9 + steps, "step": steps}
    (attempt / "begin.json").write_text(json.dumps(verdict))
    attempt.with_suffix(".json").write_text(json.dumps(verdict))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {
                "step": step,
                "loss": 1 + 7 / step + rate,
                "grad_norm": 1 / step,
                "learning_rate": rate / step,
                "tokens": 123_456,
                "seconds": 1.2345,
                "tokens_per_s": 81_234.5,
                "tokens_per_s_per_rank": 10_154.3,
                "mfu": 0.4567,
                "time": 1e9 + step,
            }
            file.write(json.dumps(line) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "eval_loss": 1 + 6 / step, "time": 1e9 + step}) + "\n")


def main() -> None:
    rounds, steps = [int(word) for word in sys.argv[1:]] + [15, 1000][len(sys.argv) - 1 :]
    with tempfile.TemporaryDirectory() as folder:
        config = subprocess.run(
            [sys.executable, "launch.py", "cluster=slurm", "model=llama8b", "--cfg", "job", "--resolve"],
            cwd=launch_latency.CLONE,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        runs = [Path(folder) / f"run-{number}" for number in range(RUNS)]
        for number, run in enumerate(runs):
            write_run(run, config, steps, (1 + number) * 1e-5)
        words = ["-m", "launcher", "compare", *map(str, runs), "--out", f"{folder}/compare.html"]
        launch_latency.measure({"bare": launch_latency.BARE, "compare": words}, rounds)
        print(f"page     {Path(folder, 'compare.html').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
