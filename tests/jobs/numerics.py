"""Compares loss and gradient norm of every layout with one process: `make numerics` writes docs/numerics.md.

All layouts train in the same four processes, one after the other, because starting ranks takes longer than twenty small steps.

    python -m tests.jobs.numerics --gpu [--precision bf16] [--total 500]

does so compiled on GPUs over NCCL, writes no page, and starts no layout after `--total` seconds. Where there are fewer GPUs than
ranks, ranks share them. Each then poses as a host of its own (NCCL_HOSTID), because NCCL refuses two ranks of a host on one GPU.
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from conf import resolve
from conf.schema import Config
from jobs.distributed import collectives
from jobs.model import build
from tests.jobs import curves, reference
from tests.jobs.ranks import spawn

ROOT = Path(__file__).resolve().parents[2]
STEPS, RANKS, ROWS = 20, 4, 12
LIMIT = 2e-3
"""Largest relative difference that can come from another order of floating-point operations. More is an error."""
BF16_LIMIT = 0.05
"""The same for bf16, whose numbers have 8 bits."""
LAYOUTS = {
    "ddp": ["parallel=ddp"],
    "fsdp": ["parallel=fsdp"],
    "fsdp, offloaded": ["parallel=fsdp_offload"],
    "hsdp, 2 x 2": ["parallel=hsdp", "parallel.shard_ranks=2"],
    "zero1": ["parallel=zero1"],
    "zero1, offloaded": ["parallel=zero1", "parallel.offload_optimizer=true"],
    "zero2": ["parallel=zero2"],
    "zero2, offloaded": ["parallel=zero2", "parallel.offload_optimizer=true"],
    "zero3": ["parallel=zero3"],
    "zero3, offloaded": ["parallel=zero3_offload"],
    "fsdp, 2 context ranks": ["parallel=fsdp", "parallel.context_ranks=2"],
    "hsdp, 4 context ranks": ["parallel=hsdp", "parallel.shard_ranks=2", "parallel.context_ranks=4"],
    "fsdp, 2 tensor ranks": ["parallel=fsdp", "parallel.tensor_ranks=2"],
    "hsdp, 2 tensor ranks": ["parallel=hsdp", "parallel.shard_ranks=1", "parallel.tensor_ranks=2"],
    "fsdp, 2 tensor and 2 context ranks": ["parallel=fsdp", "parallel.tensor_ranks=2", "parallel.context_ranks=2"],
    "zero2, 2 context ranks": ["parallel=zero2", "parallel.context_ranks=2"],
    "zero3, 2 context ranks": ["parallel=zero3", "parallel.context_ranks=2"],
}
COMMON = [
    f"cluster.train.ranks_per_node={RANKS}", "cluster.train.gpus_per_node=0", "model.architecture.num_hidden_layers=2",
    "data.max_rows=240", "data.max_length=96",
    f"train.global_batch={ROWS}", f"train.steps={STEPS}", "train.warmup_steps=5", "train.weight_decay=0.1",
    "train.precision=fp32", "train.eval_every=0", "train.save_every=0", "train.log_every=1000", "jobs=[preprocess,train]",
]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is trained. Each task has one reference curve, for all layouts."""

    adapter: str
    packed: bool
    tied: bool

    @property
    def words(self) -> list[str]:
        rate = "1e-2" if self.adapter == "lora" else "3e-3"
        return [
            f"adapter={self.adapter}", f"train.learning_rate={rate}", f"data.packing={self.packed}".lower(),
            f"model.architecture.tie_word_embeddings={self.tied}".lower(),
        ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    layout: str
    task: Task
    accumulated: int
    """Micro batches per step."""

    @property
    def possible(self) -> bool:
        return not (self.task.adapter == "lora" and "tensor" in self.layout)


def every() -> Iterator[Case]:
    """All layouts with all tasks. Tied embeddings train in one micro batch per step, untied ones in three."""
    for layout, task in product(LAYOUTS, tasks()):
        if (case := Case(layout, task, 1 if task.tied else 3)).possible:
            yield case


def some() -> Iterator[Case]:
    """Each layout with one task, the tasks in turn."""
    for number, layout in enumerate(LAYOUTS):
        task, accumulated = tasks()[number % len(tasks())], (1, 3)[number // 2 % 2]
        if not Case(layout, task, accumulated).possible:
            task = replace(task, adapter="none")
        yield Case(layout, task, accumulated)


def for_gpus() -> Iterator[Case]:
    """What differs on GPUs: layouts that split rows or matrices, with packed rows and tied embeddings; then the other layouts."""
    yield Case("fsdp, 2 context ranks", Task("none", packed=True, tied=False), 3)
    yield Case("fsdp, 2 tensor ranks", Task("none", packed=False, tied=True), 1)
    split = [layout for layout in LAYOUTS if "context" in layout or "tensor" in layout]
    for layout, task in product(split, [Task("none", packed=True, tied=True), Task("lora", packed=True, tied=False)]):
        if (case := Case(layout, task, 1 if task.tied else 3)).possible:
            yield case
    yield from (case for case in some() if case.layout not in split)


def tasks() -> list[Task]:
    return [Task(*values) for values in product(("none", "lora"), (False, True), (True, False))]


def differences(
    cases: list[Case], folder: Path, compose, words: tuple[str, ...] = (), total_s: float = math.inf
) -> dict[Case, float]:
    """For each case, the largest relative difference of loss or gradient norm over all steps.

    `compose` is the tests' fixture. `words` are settings that the reference does not have. No case starts after `total_s`.
    """
    from jobs import preprocess

    for tied in {case.task.tied for case in cases}:  # stored, because a GPU generates other random weights than a CPU
        model = build.build(compose(*COMMON, f"model.architecture.tie_word_embeddings={tied}".lower()))
        model.save_pretrained(folder / f"tied-{tied}")
        shutil.copytree(ROOT / "examples/tokenizer", folder / f"tied-{tied}", dirs_exist_ok=True)
    rows, expected = {}, {}
    for task in tqdm(dict.fromkeys(case.task for case in cases), desc="references", disable=not sys.stderr.isatty()):
        run = folder / f"rows-{task.packed}"
        config = compose(f"run_dir={run}", *COMMON, *task.words, *_stored(folder, task))
        if task.packed not in rows:
            run.mkdir()
            preprocess.run(config)
            rows[task.packed] = run / "data"
        expected[task] = reference.curve(config, run, STEPS)
    configs = []
    for number, case in enumerate(cases):
        settings = [*case.task.words, *_stored(folder, case.task), *LAYOUTS[case.layout], *words]
        config = compose(f"run_dir={folder}/{number}", *COMMON, *settings)
        parallel = config.parallel
        data_ranks = RANKS // (parallel.context_ranks * parallel.tensor_ranks)
        config.train.micro_batch = ROWS // data_ranks // case.accumulated
        Path(config.run_dir).mkdir()
        (Path(config.run_dir) / "data").symlink_to(rows[case.task.packed])
        configs.append(config)
    on_gpus = bool(configs[0].cluster.train.gpus_per_node)
    spawn(_train, RANKS, configs, time.time() + total_s, start_method="spawn" if on_gpus else "forkserver")
    found = {}
    for case, config in zip(cases, configs, strict=True):
        if (Path(config.run_dir) / "metrics.jsonl").exists():
            found[case] = max(curves.differences(curves.points(Path(config.run_dir)), expected[case.task]))
    return found


def _stored(folder: Path, task: Task) -> list[str]:
    return [f"model.source={folder}/tied-{task.tied}", "model.init=pretrained"]


def _train(rank: int, configs: list[Config], end: float) -> None:
    from jobs.distributed.process_group import process_group

    torch.set_num_threads(1)
    if configs[0].cluster.train.gpus_per_node:
        _take_gpu(rank)
    with process_group(configs[0]) as world:
        for config in tqdm(configs, desc="layouts", disable=rank > 0 or not sys.stderr.isatty()):
            parallel = config.parallel
            here = replace(world, context_ranks=parallel.context_ranks, tensor_ranks=parallel.tensor_ranks)
            if collectives.broadcast_from_rank0(lambda: time.time() > end):
                break
            started = time.monotonic()
            curves.train_here(config, here, STEPS)
            torch._dynamo.reset()  # the next layout has other graphs
            if rank == 0 and configs[0].cluster.train.gpus_per_node:
                print(f"{config.run_dir}: {time.monotonic() - started:.1f} s", flush=True)


def _take_gpu(rank: int) -> None:
    """Give this rank one of the GPUs, before CUDA starts. NCCL takes ranks that share one for ranks of several hosts."""
    count = torch.cuda.device_count()  # asks the driver's library, and starts no CUDA
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank % count)
    if count < RANKS:
        os.environ["NCCL_HOSTID"] = f"numerics-{rank}"


def table(differences_of: dict[Case, float]) -> str:
    """A Markdown table: one line per layout, one column per task."""
    columns = list(product(("none", "lora"), (False, True), (1, 3)))
    cells = {
        (case.layout, case.task.adapter, case.task.packed, case.accumulated): value
        for case, value in differences_of.items()
    }
    names = [f"{'LoRA' if a == 'lora' else 'full'}, {'packed' if p else 'padded'}, {n}" for a, p, n in columns]
    lines = ["| layout | " + " | ".join(names) + " |", "|---|" + "---:|" * len(columns)]
    for layout in LAYOUTS:
        values = [f"{cells[layout, *key]:.0e}" if (layout, *key) in cells else "" for key in columns]
        lines.append(f"| {layout} | " + " | ".join(values) + " |")
    return "\n".join(lines)


PAGE = """# Numerics: every layout compared with one process

{ranks} ranks on CPUs (Gloo, float32) train a Llama with grouped queries for {steps} steps of AdamW. Each step has {rows} rows of
different lengths, at most 96 tokens, in 1 micro batch (tied embeddings) or 3 micro batches (untied embeddings).
The reference is plain torch in one process: the whole batch at once, with a mask between packed samples.
A cell is the largest relative difference from the reference, in loss or gradient norm, over all steps.
`make numerics` writes this page, and fails if a difference is above {limit:g}. `make test` checks one column of each line.

{table}

`python -m tests.jobs.numerics --gpu` trains the same in float32 on GPUs, compiled, over NCCL. On one H200 that four ranks share
(torch 2.11, transformers 5.17, November 2026), the seven layouts with context or tensor ranks differ by at most 6.4e-06: packed
rows, tied embeddings, full or LoRA, 12 cases in 440 s.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="compiled on GPUs over NCCL; writes no page")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="with --gpu")
    parser.add_argument("--total", type=float, default=math.inf, help="start no layout after this many seconds")
    options = parser.parse_args()
    import hydra
    from hydra.core.config_store import ConfigStore

    os.environ.setdefault("OMP_NUM_THREADS", "2")
    ConfigStore.instance().store(name="schema", node=Config)

    def compose(*words: str) -> Config:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            return resolve.resolve(hydra.compose("config", overrides=list(words)))

    cases, words = list(every()), ()
    if options.gpu:
        gpus = ["cluster.train.gpus_per_node=1", f"train.precision={options.precision}"]
        cases, words = list(for_gpus()), tuple(gpus)
    limit = BF16_LIMIT if options.precision == "bf16" else LIMIT
    with tempfile.TemporaryDirectory() as folder:
        results = differences(cases, Path(folder), compose, words, options.total)
    if not options.gpu:
        text = PAGE.format(ranks=RANKS, rows=ROWS, steps=STEPS, limit=LIMIT, table=table(results))
        (ROOT / "docs/numerics.md").write_text(text)
    worst = max(results.values())
    print(table(results))
    print(f"RESULT layouts={len(LAYOUTS)} cases={len(results)} of {len(cases)} worst_relative={worst:.2e}")
    sys.exit(worst > limit)


if __name__ == "__main__":
    main()
