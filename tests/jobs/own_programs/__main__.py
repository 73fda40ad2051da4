"""Runs Accelerate's and the Trainer's program of examples/custom in the job `custom`, on two ranks that stop once and go on.

    python -m tests.jobs.own_programs [--gpu] [--only fsdp] [--at-once 4]

Needs no Slurm: each rank poses as a node of its own, with the environment of the job. It fails unless Accelerate has made of the
environment what `parallel` and `train.precision` say, the losses are those of one process with plain torch, every row is trained
once, and the merged checkpoint is the model of that process. On GPUs, ranks can share one: NCCL takes them for ranks of several
hosts (NCCL_HOSTID). Without GPUs, FSDP is forced on Accelerate, which otherwise replicates there.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from conf.program_checkpoints import numbered
from conf.resolve import load
from jobs.consolidation import of_program
from launcher.environment import job_variables
from launcher.plan import plan
from tests.jobs.own_programs import observed, plain

ROOT = Path(__file__).resolve().parents[3]
STEPS, ACCUMULATED, RANKS, BATCH = 8, 2, 2, 4
STOP_AT = 9
"""Batches of rank 0 after which it is asked to stop: in the middle of the fifth step."""
LIMITS = {"fp32": 1e-5, "bf16": 1e-3}
"""Largest difference of a loss, as a share of it."""


@dataclass(frozen=True)
class Case:
    """One program under one layout."""

    script: str
    launcher: str
    layout: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.script.partition('_')[0]}-{self.layout}-{self.precision}"


CASES = [
    Case(script, launcher, layout, precision)
    for script, launcher in (("accelerate_train.py", "accelerate"), ("trainer_train.py", "torchrun"))
    for layout in ("fsdp", "zero2", "zero3")
    for precision in ("fp32", "bf16")
]


class WrongError(Exception):
    """A program did something else than it should."""


def expect(what: str, found: object, expected: object) -> None:
    """Raise WrongError if two values differ."""
    if found != expected:
        raise WrongError(f"{what}: {found} instead of {expected}")


def launch(run: Path, case: Case, model: Path, gpu: bool) -> None:
    """Let launch.py write the run folder of a case."""
    command = (
        f"python {observed.__file__} {run} {STOP_AT} {ROOT}/examples/custom/{case.script} --model {model} --steps {STEPS} "
        f"--save-every 3 --accumulate {ACCUMULATED}"
    )
    words = [
        f"run_dir={run}", "cluster=slurm", "submit=script", "pipeline=custom", "model=hub", f"model.source={model}",
        f"parallel={case.layout}", f"train.precision={case.precision}", f"custom.launcher={case.launcher}",
        f'custom.command="{command}"', f"cluster.train.nodes={RANKS}", "cluster.train.ranks_per_node=1",
        f"cluster.train.gpus_per_node={int(gpu)}", "cluster.train.cpus_per_rank=1", "cluster.train.memory_gib=null",
        "cluster.inference.gpus_per_node=0", f"cluster.scratch={run.parent}", "consolidate.dtype=fp32",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, ROOT / "launch.py", *words], capture_output=True, text=True, check=False)
    expect(
        "launch.py", (done.returncode, done.stdout[-3000:] + done.stderr[-3000:])[: 1 + (done.returncode != 0)], (0,)
    )


def start(run: Path, attempt: int, node: int, port: int, gpu: bool) -> subprocess.Popen[bytes]:
    """Start the job `custom` on one rank, with the environment that it has in a Slurm job."""
    config = load(run / "config.yaml")
    custom = next(job for job in plan(config) if job.name == "custom")
    place = {
        "RANK": node,
        "WORLD_SIZE": RANKS,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "MUSTER_ATTEMPT": attempt,
    }
    values = job_variables(config, custom) | {name: str(value) for name, value in place.items()}
    values |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if gpu:
        count = torch.cuda.device_count()
        values |= {"CUDA_VISIBLE_DEVICES": str(node % count)}
        values |= {"NCCL_HOSTID": f"{run.name}-{node}"} if count < RANKS else {}
    elif config.parallel.backend.name == "fsdp":
        values |= {observed.PRETENDS: "1"}
    words = [sys.executable, "-m", "jobs", "custom", str(run / "config.yaml")]
    with (run / f"attempt-{attempt}-{node}.log").open("wb") as log:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | values
        environ["PYTHONPATH"] = str(ROOT)
        return subprocess.Popen(words, env=environ, stdout=log, stderr=log, cwd=ROOT)


def run_attempt(run: Path, attempt: int, gpu: bool, timeout_s: float) -> list[int]:
    """Run the job to its end. Returns the exit codes of the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = [start(run, attempt, node, port, gpu) for node in range(RANKS)]
    deadline = time.monotonic() + timeout_s
    try:
        return [task.wait(max(1, deadline - time.monotonic())) for task in tasks]
    except subprocess.TimeoutExpired:
        raise WrongError(f"attempt {attempt} did not end in {timeout_s:.0f} s; {tail(run, attempt)}") from None
    finally:
        for task in tasks:
            task.kill()


def tail(run: Path, attempt: int) -> str:
    """The end of the logs of an attempt."""
    logs = [*run.glob(f"attempt-{attempt}-*.log"), *run.glob(f"jobs/custom/attempt-{attempt}/rank-*.log")]
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2500:]}" for log in sorted(logs))


def expected_plan(case: Case, gpu: bool) -> dict[str, object]:
    """What Accelerate should have made of the environment."""
    is_fsdp = case.layout == "fsdp"
    mixed = "bf16" if case.precision == "bf16" else "no"
    found: dict[str, object] = {
        "kind": "FSDP" if is_fsdp else "DEEPSPEED",
        "ranks": RANKS,
        "precision": mixed,
        "device": "cuda" if gpu else "cpu",
        "backend": "nccl" if gpu else "gloo",
    }
    if is_fsdp:
        return found | {
            "version": 2, "reshards": True, "sharded": True, "blocks": plain.BLOCKS, "stored_as": ["torch.float32"],
        }  # fmt: skip
    stage = int(case.layout[-1])
    return found | {
        "stage": stage, "micro_batch": BATCH, "batch": BATCH * ACCUMULATED * RANKS, "accumulated": ACCUMULATED,
        "computes_in": case.precision,
        "clipping": plain.CLIPPED_AT,
        "optimizer": "DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer",
    }  # fmt: skip


def check_plan(run: Path, case: Case, gpu: bool) -> None:
    """Compare what Accelerate has made of the environment, on each rank."""
    expected = expected_plan(case, gpu)
    for rank in range(RANKS):
        found = json.loads((run / f"found-{rank}.json").read_text())
        expect(f"rank {rank}", found.keys(), expected.keys())
        for name, value in expected.items():
            expect(f"{name} of rank {rank}", found[name], value)


def check_checkpoint(run: Path, case: Case) -> None:
    """The checkpoints have the format of the layout, with a part of each rank."""
    expect("checkpoints", [number for number, _ in numbered(run / "checkpoints")], [3, 5, 6, STEPS])
    folder = numbered(run / "checkpoints")[-1][1]
    pattern, kind = ("**/__*_0.distcp", "DCP") if case.layout == "fsdp" else ("**/*optim_states.pt", "ZeRO")
    parts = {path.parent for path in folder.glob(pattern)}
    expect("parts", {len(list(part.glob(pattern.removeprefix("**/")))) for part in parts}, {RANKS})
    expect("format", of_program._weights(folder).kind, kind)


def check_losses(run: Path, case: Case, model: Path) -> float:
    """Train the same rows in one process. Returns the largest difference of a loss, as a share of it."""
    lines = [
        [json.loads(line) for line in (run / f"batches-{rank}.jsonl").read_text().splitlines()] for rank in range(RANKS)
    ]
    expect("batches of each rank", [len(items) for items in lines], [STEPS * ACCUMULATED] * RANKS)
    rows = [tuple(row) for items in lines for item in items for row in item["tokens"]]
    expect("rows that were trained twice", len(rows) - len(set(rows)), 0)
    batches = [[item["tokens"] for item in ranks] for ranks in zip(*lines, strict=True)]
    found = [item["loss"] for ranks in zip(*lines, strict=True) for item in ranks]
    expected, network = plain.losses(model, batches, plain.RECIPES[case.script], ACCUMULATED)
    merged = LlamaForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    with torch.no_grad():
        found.append(plain.loss_of(merged, batches[-1][0]).item())
        expected.append(plain.loss_of(network, batches[-1][0]).item())
        untrained = plain.loss_of(LlamaForCausalLM.from_pretrained(model), batches[-1][0]).item()
    limit = LIMITS[case.precision]
    moved = abs(expected[-1] - untrained) / untrained
    if moved < 3 * limit:
        raise WrongError(f"training has changed the loss by {moved:.1e} only, so the comparison says nothing")
    worst = max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
    if worst > limit:
        raise WrongError(f"losses differ by {worst:.1e}: {found} instead of {expected}")
    return worst


def check(case: Case, folder: Path, gpu: bool, timeout_s: float) -> str:
    """Run a case. Returns its line of the result."""
    run, begun = folder / case.name, time.monotonic()
    try:
        launch(run, case, folder / "tiny", gpu)
        codes = run_attempt(run, 1, gpu, timeout_s)
        if "Stopped" not in (log := tail(run, 1)) or 0 in codes:
            raise WrongError(f"the first attempt did not stop (exit codes {codes}): {log}")
        if any(run_attempt(run, 2, gpu, timeout_s)):
            raise WrongError(f"the second attempt failed: {tail(run, 2)}")
        check_plan(run, case, gpu)
        check_checkpoint(run, case)
        words = [sys.executable, "-m", "jobs", "consolidate", str(run / "config.yaml")]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        expect("consolidate", (done.returncode, done.stderr[-3000:])[: 1 + (done.returncode != 0)], (0,))
        worst = check_losses(run, case, folder / "tiny")
    except (WrongError, OSError, ValueError, StopIteration) as error:
        return f"FAILED {case.name}: {error!r}".replace("\\n", "\n")
    return f"ok {case.name}: losses differ by {worst:.1e}, {time.monotonic() - begun:.0f} s"


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.own_programs", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on GPUs over NCCL")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="cases with all of these words in their name"
    )
    parser.add_argument("--at-once", type=int, default=1, help="cases that run at one time (1)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of an attempt (300)")
    parser.add_argument("--work", type=Path, help="folder for the runs, which stay there")
    options = parser.parse_args()
    folder = (options.work or Path(tempfile.mkdtemp())).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plain.make_model(folder / "tiny")
    shutil.copytree(ROOT / "examples/tokenizer", folder / "tiny", dirs_exist_ok=True)
    cases = [case for case in CASES if all(word in case.name for word in options.only)]
    failed = 0
    with ThreadPoolExecutor(options.at_once) as pool:
        for line in pool.map(partial(check, folder=folder, gpu=options.gpu, timeout_s=options.timeout), cases):
            failed += line.startswith("FAILED")
            print(line, flush=True)
    if options.work is None:
        shutil.rmtree(folder)
    print(f"RESULT own_programs={len(cases)} failed={failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
