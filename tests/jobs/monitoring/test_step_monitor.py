"""jobs/monitoring/step_monitor.py, phases.py, spread.py, divergence.py, tracing.py and jobs/monitoring/flops.py:
what a user watches is what happened."""

import gzip
import json
import random
import string
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conf.errors import DivergedError
from jobs.monitoring import step_monitor, stragglers
from jobs.monitoring.flops import Work, peak
from jobs.monitoring.step_timer import Phases
from jobs.training.divergence import PATIENCE, WINDOW, Divergence
from launcher.run_folder.attempts import metrics
from tests.jobs import ranks
from tests.jobs.networks import adapted, network, rows, whole

CPU = torch.device("cpu")


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_flops_are_those_that_torch_counts(compose, kind, adapter):
    """But for attention, which torch counts as if nothing were masked, and the first block, below which nothing is trained."""
    length, found = 64, rows([64], trained=1.1)
    made = network(kind, attention="eager", num_hidden_layers=3, vocab_size=97, hidden_size=64)
    config = compose(f"adapter={adapter}")
    work = step_monitor.work(adapted(made) if adapter == "lora" else made, config)
    base = network(kind, attention="eager", num_hidden_layers=3, vocab_size=97, hidden_size=64)
    for parameter in base.parameters():
        parameter.requires_grad_(adapter == "none")
    base.get_input_embeddings().weight.requires_grad_(True)  # so that gradients reach the first block
    with FlopCounterMode(display=False) as counted:
        base(input_ids=whole(found)["input_ids"]).logits.sum().backward()
    full = counted.get_total_flops()
    ours = work.flops(length, length, 2 * length**2)  # a full mask costs twice a causal one
    if adapter == "lora":  # eager attention differentiates both products, trained or not: only weights differ
        assert work.frozen
    assert ours == pytest.approx(full, rel=0.02)


def test_flops_are_the_benchmarks_for_a_row_of_one_sample():
    """Llama 3.1 8B at 8192 tokens: 51.5 GFLOP a token, and 4 instead of 6 a weight under an adapter."""
    total, embedding, layers, hidden, length = 8_030_261_248, 128_256 * 4096, 32, 4096, 8192
    shape = (total - 2 * embedding, embedding, layers, hidden)
    token = Work(*shape, frozen=False).flops(length, length, length**2) / length
    assert token == 6 * (total - embedding) + 6 * layers * length * hidden == pytest.approx(51.5e9, rel=0.002)
    assert (
        Work(*shape, frozen=True).flops(length, length, length**2) / length
        == 4 * (total - embedding) + 6 * layers * length * hidden
    )


def test_packed_samples_cost_their_own_lengths_only():
    work = Work(1000, 100, 2, 16, frozen=False)
    assert work.flops(8, 8, 2 * 4**2) < work.flops(8, 8, 8**2)
    assert work.flops(8, 0, 0) == 6 * 1000 * 8


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA H20", 148), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_known_by_its_name(name, teraflops):
    assert peak(name) == 1e12 * teraflops


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA GeForce RTX 4090", "AMD Instinct MI300X", "cpu"])
def test_no_peak_is_made_up(name):
    assert peak(name) is None


def test_phases_hold_their_time_and_blocks_only_forwards():
    phases, block = Phases(CPU), nn.Linear(2, 2)
    block.forward = lambda value: (time.sleep(0.02), value)[1]
    phases.around([block])
    for phases.on in (True, False):
        with phases("forward"):
            block(torch.zeros(2))
        with phases("data"):
            pass
    found = phases.read()
    assert found["forward"] >= found["blocks"] >= 0.02
    assert found["data"] < 0.02
    assert found["forward"] < 2 * 0.02 + 0.5
    assert set(phases.read().values()) == {0.0}


def says(spread_, *, memory=(20.0,) * 4, busy=(1.0,) * 4, cost=(1.0,) * 4):
    return spread_.warnings(
        *(np.array(values, dtype=np.float64) for values in (np.array(memory) * stragglers.GIB, busy, cost))
    )


def test_a_rank_that_takes_more_memory_is_named_once():
    found = stragglers.Spread(["a", "a", "b", "b"])
    assert says(found, memory=(20, 20, 20.9, 20)) == []  # below 1 GiB more
    assert says(found, memory=(20, 20, 21.5, 20)) == []  # below 10 % more
    (said,) = says(found, memory=(20, 20, 23, 20))
    assert said.startswith("rank 2 on b has peaked at 23.0 GiB, the median rank at 20.0")
    assert says(found, memory=(20, 20, 23, 20)) == []


def test_a_rank_that_stays_slow_is_named_and_one_with_more_to_do_is_not():
    found = stragglers.Spread(["a", "a", "b", "b"])
    slow = [says(found, busy=(1, 1, 1, 1.4)) for _ in range(5)]
    assert [len(item) for item in slow] == [0, 0, 1, 0, 0]
    assert slow[2][0].startswith("rank 3 on b is slow: 1.40 times")
    assert not any(says(found, busy=(1, 1, 1, 1.4), cost=(1, 1, 1, 1.4)) for _ in range(5))
    assert not any(says(found, busy=(1, 1, 1, 1 + 0.4 * (step % 2))) for step in range(9))  # now and then is chance


def test_a_rank_that_has_nothing_to_do_is_named():
    found = stragglers.Spread(["a", "a", "b", "b"])
    said = [says(found, busy=(0.2, 1, 1, 1), cost=(0.2, 1, 1, 1)) for _ in range(3)]
    assert said[2][0].startswith("rank 0 on a is idle: it works 20%")


def ends_at(losses, rise=2.0):
    seen = Divergence(rise)
    for step, value in enumerate(losses, 1):
        try:
            seen.see(step, value)
        except DivergedError as error:
            return step, str(error)
    return None


CALM = [8 - 6 * min(1, step / 60) + 0.1 * (step % 5) for step in range(200)]


@pytest.mark.parametrize(
    "losses",
    [
        CALM,
        [*CALM, 1e6, *CALM[-100:]],  # a spike, however high
        [*CALM, *[9.0] * 10, *CALM[-100:]],  # one that lasts
        [*CALM, *[2 + 5 * 0.93**step for step in range(150)]],  # one that heals
        [*[2.0] * 5, *[5.0] * 40, *[2.0] * 100],  # a warm-up that is too steep, and heals
        [*CALM, *[3.9] * 500],  # another set of rows, less than two nats harder
        [9.0, *[11.0 + 0.2 * (step % 3) for step in range(300)]],  # never was better
    ],
)  # fmt: skip
def test_a_loss_that_heals_or_is_noisy_has_not_diverged(losses):
    assert ends_at(losses) is None


def test_a_loss_that_rises_and_stays_up_ends_training():
    losses = [*CALM, *[7.0] * 200]
    step, said = ends_at(losses)
    assert len(CALM) + PATIENCE <= step <= len(CALM) + PATIENCE + WINDOW
    assert said.startswith("train.max_loss_rise=2.0: step ")
    assert ends_at(losses, rise=None) is None


@pytest.mark.parametrize("resumed", [0, 10, 150, 230])
def test_a_resumed_run_ends_at_the_same_step(resumed):
    losses = [*CALM, *[7.0] * 200]
    end, _ = ends_at(losses)
    seen = Divergence(2.0, losses[:resumed])
    with pytest.raises(DivergedError, match=f"step {end}:"):
        for step in range(resumed, len(losses)):
            seen.see(step + 1, losses[step])


RUN = [
    "cluster.train.ranks_per_node=2", "cluster.train.gpus_per_node=0", "train.steps=8", "train.save_every=4",
    "train.global_batch=8", "train.eval_every=4", "train.log_every=4", "train.precision=fp32", "train.warmup_steps=0",
    "data.max_rows=120", "jobs=[preprocess,train]",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("watched") / "run"
    return run, ranks.run(f"run_dir={run}", *RUN, "train.profile=true", "train.profile_ranks=[0,1]")


@pytest.mark.slow
def test_a_run_says_where_its_time_and_memory_go(trained):
    run, shown = trained
    steps = [line for line in metrics(run) if "loss" in line]
    assert all(line["tokens_per_s_per_rank"] == pytest.approx(line["tokens_per_s"] / 2, abs=0.1) for line in steps)
    assert not any("mfu" in line for line in steps)  # of a CPU none is known
    told = [line for line in steps if "forward_s" in line]
    assert [line["step"] for line in told] == [4, 8]
    for line in told:
        parts = [line[f"{name}_s"] for name in ("data", "forward", "backward", "optimizer")]
        assert all(part > 0 for part in parts)
        assert 0.1 < line["memory_gib_min"] <= line["memory_gib_median"] <= line["memory_gib_max"] < 4
    whole = sum(line["seconds"] for line in steps[:4]) / 4
    assert (
        0.5 * whole < sum(told[0][f"{name}_s"] for name in ("data", "forward", "backward", "optimizer")) <= whole * 1.01
    )
    assert sum("checkpoint_s" in line for line in metrics(run)) == 2
    assert "mesh      fsdp: 2 ranks on 1 node" in shown
    assert "took" in shown and "left 0:00:00" in shown


@pytest.mark.slow
def test_a_trace_has_the_phases_of_three_steps(trained):
    run, shown = trained
    for rank in (0, 1):
        (path,) = (run / "profile").glob(f"*.rank-{rank}.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert sum(event.get("name") == "optimizer" and event.get("cat") == "user_annotation" for event in events) == 3
    assert "profile   " in shown


@pytest.mark.slow
def test_the_report_is_one_page_of_valid_svg(trained):
    from html.parser import HTMLParser

    run, _ = trained
    text = (run / "report.html").read_text(encoding="utf-8")
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    Reader().feed(text)
    lines = [attrs["points"].split() for tag, attrs in found if tag == "polyline"]
    assert len(lines[0]) == 8  # a point a step
    numbers = [float(number) for line in lines for point in line for number in point.split(",")]
    assert all(0 <= number <= 100 for number in numbers)
    assert not [attrs for _, attrs in found if {"src", "href"} & attrs.keys()]
    for title in ("Loss", "Gradient norm", "Learning rate", "Tokens/s per rank"):
        assert f"<h2>{title}" in text
    assert "8 of 8" in text


@pytest.mark.proof
def test_a_loss_that_stays_up_ends_with_a_verdict_and_saves_nothing_after(tmp_path):
    """Rows in the order of their file: after those that are learnt by heart come some that nobody can learn."""
    chance, run = random.Random(0), tmp_path / "run"
    noise = ["".join(chance.choices(string.ascii_lowercase, k=24)) for _ in range(2000)]
    rows = [{"instruction": f"Greet guest {number}.", "output": "Welcome, and good day."} for number in range(500)]
    rows += [{"instruction": noise[2 * number], "output": noise[2 * number + 1]} for number in range(1000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"run_dir={run}", *RUN, "data=jsonl", f"data.path={path}", "data.order=file", "train.steps=180", "train.save_every=20",
             "train.eval_every=0", "data.max_rows=null", "train.max_loss_rise=1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, ranks.CLONE / "launch.py", *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "training has diverged" in done.stdout + done.stderr
    ended = max(line["step"] for line in metrics(run))
    saved = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    assert ended - 20 <= max(saved) < ended < 180
    assert f"{ended} of 180" in (run / "report.html").read_text(encoding="utf-8")
    (verdict,) = (run / "jobs/train").glob("attempt-*.json")
    assert json.loads(verdict.read_text())["status"] == "user_error"
