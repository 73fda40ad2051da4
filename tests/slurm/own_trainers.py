"""Runs every program of examples/custom on a real Slurm, which preempts each once, and writes the table of docs/own-trainer.md.

`python -m tests.slurm.own_trainers`, which needs TRL and Ray: `make custom` installs them.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conf.files import write_text
from launcher import slurm
from launcher.run_folder import attempts
from launcher.status import requests
from tests.slurm import cluster, runs

STEPS, SAVE_EVERY = 100, 10
GRACE_S = 60
"""Seconds between Slurm's warning and its SIGKILL when it preempts a job."""
PAGE = runs.CLONE / "docs/own-trainer.md"
MARKS = "<!-- table of make custom -->", "<!-- end -->"
HEADER = """
| program | started by | layout | preempted at step | resumed at step | merged |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Example:
    """One program of examples/custom and how it is started."""

    title: str
    script: str
    launcher: str
    layout: str
    data: str = ""
    """Name of the file with its rows, for programs that read some."""


EXAMPLES = (
    Example("torch.distributed with FSDP2", "torch_train.py", "torchrun", "fsdp"),
    Example("torch.distributed with FSDP2", "torch_train.py", "srun", "fsdp"),
    Example("Accelerate", "accelerate_train.py", "accelerate", "ddp"),
    Example("Accelerate with DeepSpeed", "accelerate_train.py", "accelerate", "zero2"),
    Example("transformers.Trainer", "trainer_train.py", "torchrun", "ddp"),
    Example("transformers.Trainer with DeepSpeed", "trainer_train.py", "torchrun", "zero3"),
    Example("TRL SFTTrainer", "sft_train.py", "accelerate", "ddp", data="rows.jsonl"),
    Example("TRL DPOTrainer", "dpo_train.py", "torchrun", "ddp", data="pairs.jsonl"),
    Example("Ray Train", "ray_train.py", "ray", "ddp"),
)


def make_inputs(folder: Path) -> Path:
    """Write a tiny model, rows of chat and pairs of answers to a new folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = runs.damaged_model(folder / "tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(model)).save_pretrained(model)
    rows = [json.loads(line) for line in (runs.CLONE / "examples/sample.jsonl").read_text().splitlines()]
    asked = [[{"role": "user", "content": row["instruction"]}] for row in rows]
    answers = [[{"role": "assistant", "content": row["output"]}] for row in rows]
    chats = [{"messages": [*prompt, *answer]} for prompt, answer in zip(asked, answers, strict=True)]
    others = answers[1:] + answers[:1]
    pairs = [
        {"prompt": prompt, "chosen": answer, "rejected": other}
        for prompt, answer, other in zip(asked, answers, others, strict=True)
    ]
    for name, items in (("rows.jsonl", chats), ("pairs.jsonl", pairs)):
        write_text(folder / name, "".join(f"{json.dumps(item)}\n" for item in items))
    return folder


def saved(run: Path) -> int:
    """The number of the newest checkpoint; 0 if there is none."""
    return attempts.newest_checkpoint(run / "jobs/custom") or 0


def start(run: Path, inputs: Path, example: Example, *overrides: str, steps: int = STEPS) -> None:
    """Submit the run of an example."""
    words = (
        f"{runs.CLONE}/examples/custom/{example.script} --model {inputs}/tiny --steps {steps} --save-every {SAVE_EVERY}"
    )
    data = f" --data {inputs}/{example.data}" if example.data else ""
    runs.start(
        run, "pipeline=custom", "model=hub", f"model.source={inputs}/tiny", f"parallel={example.layout}",
        f"custom.launcher={example.launcher}", f'custom.command="python {words}{data}"', f"cluster.python={sys.executable}",
        f"cluster.signal_s={GRACE_S}", "cluster.train.partition=gpu", *overrides,
    )  # fmt: skip


@contextmanager
def grace() -> Iterator[None]:
    """Give the jobs that Slurm preempts in this block GRACE_S seconds to end."""
    shown = slurm.call("scontrol", "show", "partition", "gpu")
    before = re.findall(r"GraceTime=(\d+)", shown)[0]
    slurm.call("scontrol", "update", "PartitionName=gpu", f"GraceTime={GRACE_S}")
    try:
        yield
    finally:
        slurm.call("scontrol", "update", "PartitionName=gpu", f"GraceTime={before}")


def preempt(run: Path, timeout_s: float = 120) -> None:
    """Submit a job of a higher priority that takes the nodes of the run's training for itself, and wait for its end."""
    nodes = slurm.show_job(runs.job_id(run, "custom"))["NodeList"]
    words = (
        "--parsable",
        "--partition=high",
        "--exclusive",
        f"--nodelist={nodes}",
        "--output=/dev/null",
        "--wrap=sleep 2",
    )
    higher = slurm.call("sbatch", *words).strip()
    runs.wait_until(lambda: slurm.show_job(higher)["JobState"] == "COMPLETED", timeout_s)


def check(run: Path, inputs: Path, example: Example, *overrides: str, timeout_s: float = 600) -> dict[str, object]:
    """Run an example, let Slurm preempt it after its first checkpoint, and check that it was requeued, resumed and merged."""
    from transformers import AutoModelForCausalLM

    start(run, inputs, example, *overrides)
    runs.wait_until(lambda: saved(run) >= SAVE_EVERY or not runs.is_active(run), timeout_s)
    with grace():
        preempt(run)
    states = runs.finish(run, timeout_s)
    *stopped, last = attempts.verdicts(run / "jobs/custom")
    assert stopped, last
    assert {(item["status"], item["requeued"]) for item in stopped} == {("preempted", True)}, stopped
    assert {item["job_id"] for item in stopped} == {last["job_id"]}, (
        last
    )  # requeued by Slurm: nobody has submitted another
    first = stopped[-1]
    assert SAVE_EVERY <= first["saved"] == first["step"] < STEPS, first
    assert last["status"] == "completed", last
    assert (last["resumed"], last["saved"]) == (first["saved"], STEPS), last
    assert sorted(runs.logs(run, "custom")) == [0, 1, 2, 3]
    trained = [losses(run, item["attempt"]) for item in (*stopped, last)]
    assert sum(trained) == STEPS, trained
    verdict = states["consolidate"].verdict
    assert verdict, states
    assert verdict["status"] == "completed", verdict
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert '"verified": true' in (run / "model/muster.json").read_text()
    return {"preempted": first["step"], "resumed": last["resumed"]}


def losses(run: Path, attempt: int) -> int:
    """How many losses of training steps the log of rank 0 has: every program prints one after each step."""
    log = run / f"jobs/custom/attempt-{attempt}/rank-0.log"
    text = log.read_text() if log.exists() else ""  # preempted before the program has printed anything
    return len(re.findall(r"^step \d+ loss |\{'loss': ", text, re.MULTILINE))


def line(example: Example, result: dict[str, object] | str) -> str:
    """A line of the table. `result` is what `check` returned, or what failed."""
    if isinstance(result, str):
        return f"| {example.title} | {example.launcher} | {example.layout} | | | failed: {result} |"
    numbers = f"{result['preempted']} | {result['resumed']} of {STEPS}"
    return f"| {example.title} | {example.launcher} | {example.layout} | {numbers} | equal |"


def write_table(page: Path, lines: list[str]) -> None:
    """Replace the lines of the table in the page. Programs that did not run keep theirs."""
    before, _, rest = page.read_text().partition(MARKS[0])
    table, _, after = rest.partition(MARKS[1])
    rows = []
    for example in EXAMPLES:
        begin = line(example, "").partition("| |")[0]
        rows += [item for item in [*lines, *table.splitlines()] if item.startswith(begin)][:1]
    write_text(page, before + MARKS[0] + HEADER + "\n".join(rows) + "\n\n" + MARKS[1] + after)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.own_trainers", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="scripts, launchers or layouts (all)")
    parser.add_argument("--work", type=Path, default=runs.CLONE / "runs/own-trainers", help="folder for the runs")
    options = parser.parse_args()
    work = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    inputs = make_inputs(work)
    already_up = cluster.running()
    running = already_up or cluster.up()
    os.environ["SLURM_CONF"] = str(running.conf)
    lines: list[str] = []
    chosen = [
        example
        for example in EXAMPLES
        if not options.only or {example.script, example.launcher, example.layout} & set(options.only)
    ]
    for example in chosen:
        begun = time.monotonic()
        name = f"{example.script.partition('.')[0]}-{example.launcher}-{example.layout}"
        try:
            result = check(work / name, inputs, example)
            lines.append(line(example, result))
        except AssertionError as error:
            lines.append(line(example, re.sub(r"\s+", " ", str(error))[:100]))
            requests.cancel(work / name)
        print(f"{lines[-1]} {time.monotonic() - begun:.0f} s", flush=True)
        write_table(PAGE, lines)
    failed = sum("failed:" in item for item in lines)
    if already_up is None:
        running.down()
    print(f"RESULT own_trainers={len(lines)} passed={len(lines) - failed} failed={failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
