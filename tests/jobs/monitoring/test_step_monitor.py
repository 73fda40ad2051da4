"""jobs/monitoring: step_monitor, flops, step_timer, stragglers, profiler; and jobs/training/divergence.py.

What a user sees of a training must be what happened.
"""

import gzip
import json
import random
import string
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import loops
from conf.errors import DivergedError
from jobs.monitoring import stragglers
from jobs.monitoring.flops import ModelFlops, count_weights, peak_flops
from jobs.monitoring.step_timer import StepTimer
from jobs.training import flat_loss
from jobs.training.divergence import PATIENCE, WINDOW, DivergenceDetector
from launcher.run_folder.attempts import metrics
from tests.jobs import ranks
from tests.jobs.networks import SMALL, adapted, network, rows, whole

CPU = torch.device("cpu")
PHASES = ("data", "forward", "backward", "optimizer")


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_flops_are_those_that_torch_counts(kind: str, adapter: str, tied: bool) -> None:
    """Two differences to torch are made up for: torch counts attention without a mask, and under LoRA it would skip the
    gradients of the first block's input."""
    shape = {"num_hidden_layers": 3, "vocab_size": 97, "hidden_size": 64, "tie_word_embeddings": tied}
    length, frozen = 64, adapter == "lora"
    model = network(kind, attention="eager", **shape)
    counted = count_weights(adapted(model) if frozen else model, frozen=frozen)
    base = network(kind, attention="eager", **shape)
    for parameter in base.parameters():
        parameter.requires_grad_(not frozen)
    embedding = base.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())  # gradients reach block 1
    with FlopCounterMode(display=False) as counter:
        base(input_ids=whole(rows([length], trained=1.1)).input_ids).logits.sum().backward()
    # a full mask costs twice a causal one
    ours = counted.training(tokens=length, trained_tokens=length, squared_lengths=2 * length**2)
    assert counted.frozen == frozen
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_flops_of_the_benchmarks_loops_are_those_that_torch_counts(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/loops.py is compared with Muster, so both must count the same. torch counts attention without a mask."""
    shape = LlamaConfig(
        **SMALL | {"num_hidden_layers": 3, "tie_word_embeddings": tied}, attn_implementation="eager", pad_token_id=0
    )
    monkeypatch.setattr(loops, "shape", lambda name: shape)
    counted = loops.count_flops(Namespace(loop="fsdp", shape="small"))
    length, model = 64, LlamaForCausalLM(shape)
    tokens = torch.randint(3, shape.vocab_size, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    ours = counted.training(tokens=length, trained_tokens=length, squared_lengths=2 * length**2)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_of_llama_8b_with_one_sample_per_row() -> None:
    """Llama 3.1 8B at 8192 tokens needs 51.5 GFLOP per token. Under an adapter a weight costs 4 instead of 6 FLOPs."""
    parameters, embedding, layers, hidden, length = 8_030_261_248, 128_256 * 4096, 32, 4096, 8192
    attention = 6 * layers * length * hidden

    def per_token(frozen: bool) -> float:
        model = ModelFlops(parameters - 2 * embedding, embedding, layers, hidden, frozen)
        return float(model.training(tokens=length, trained_tokens=length, squared_lengths=length**2)) / length

    assert per_token(False) == 6 * (parameters - embedding) + attention == pytest.approx(51.5e9, rel=0.002)
    assert per_token(True) == 4 * (parameters - embedding) + attention


def test_packed_samples_cost_their_own_lengths_only() -> None:
    model = ModelFlops(1000, 100, 2, 16, frozen=False)
    packed = model.training(tokens=8, trained_tokens=8, squared_lengths=2 * 4**2)
    assert packed < model.training(tokens=8, trained_tokens=8, squared_lengths=8**2)
    assert model.training(tokens=8, trained_tokens=0, squared_lengths=0) == 6 * 1000 * 8


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA H20", 148), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_known_by_its_name(name: str, teraflops: float) -> None:
    assert peak_flops(name) == 1e12 * teraflops


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA GeForce RTX 4090", "AMD Instinct MI300X", "cpu"])
def test_an_unknown_gpu_has_no_peak(name: str) -> None:
    assert peak_flops(name) is None


def test_phases_have_their_time_and_blocks_only_forwards() -> None:
    def forward(value: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return value

    timer, block = StepTimer(CPU), nn.Linear(2, 2)
    block.forward = forward
    timer.time_blocks([block])
    for enabled in (True, False):
        timer.enabled = enabled
        with timer("forward"):
            block(torch.zeros(2))
        with timer("data"):
            pass
    seconds = timer.read()
    assert seconds["forward"] >= seconds["blocks"] >= 0.02
    assert seconds["data"] < 0.02
    assert seconds["forward"] < 2 * 0.02 + 0.5
    assert set(timer.read().values()) == {0.0}


def warnings(
    detector: stragglers.StragglerDetector,
    *,
    memory: Sequence[float] = (20.0,) * 4,
    busy: Sequence[float] = (1.0,) * 4,
    cost: Sequence[float] = (1.0,) * 4,
) -> list[str]:
    """Of four ranks; memory in GiB."""
    messages: list[str] = detector.warnings(
        memory=np.array(memory, dtype=np.float64) * stragglers.GIB,
        busy=np.array(busy, dtype=np.float64),
        cost=np.array(cost, dtype=np.float64),
    )
    return messages


@pytest.fixture
def detector() -> stragglers.StragglerDetector:
    return stragglers.StragglerDetector(["a", "a", "b", "b"])


def test_a_rank_that_uses_more_memory_is_named_once(detector: stragglers.StragglerDetector) -> None:
    assert warnings(detector, memory=(20, 20, 20.9, 20)) == []  # below 1 GiB more
    assert warnings(detector, memory=(20, 20, 21.5, 20)) == []  # below 10 % more
    [message] = warnings(detector, memory=(20, 20, 23, 20))
    assert message.startswith("rank 2 on b has peaked at 23.0 GiB of memory, the median rank at 20.0")
    assert warnings(detector, memory=(20, 20, 23, 20)) == []


def test_a_slow_rank_is_named_but_not_one_with_more_work(detector: stragglers.StragglerDetector) -> None:
    slow = [warnings(detector, busy=(1, 1, 1, 1.4)) for _ in range(5)]
    assert [len(messages) for messages in slow] == [0, 0, 1, 0, 0]
    assert slow[2][0].startswith("rank 3 on b is slow: it needs 1.40 times")
    assert not any(warnings(detector, busy=(1, 1, 1, 1.4), cost=(1, 1, 1, 1.4)) for _ in range(5))
    # slow in every second line is chance
    assert not any(warnings(detector, busy=(1, 1, 1, 1 + 0.4 * (step % 2))) for step in range(9))


def test_an_idle_rank_is_named(detector: stragglers.StragglerDetector) -> None:
    messages = [warnings(detector, busy=(0.2, 1, 1, 1), cost=(0.2, 1, 1, 1)) for _ in range(3)]
    assert messages[2][0].startswith("rank 0 on a is idle: it works 20%")


def diverged_at(losses: Iterable[float], rise: float | None = 2.0) -> tuple[int, str] | None:
    """The step at which these losses end a training, and the message; None if they do not."""
    divergence = DivergenceDetector(rise)
    for step, loss in enumerate(losses, 1):
        try:
            divergence.add_loss(step, loss)
        except DivergedError as error:
            return step, str(error)
    return None


@pytest.mark.parametrize(
    ("losses", "is_said"),
    [
        ([2.0] * 260, True),
        ([2.0 + 0.3 * (step % 3) for step in range(260)], True),
        ([2.0 - 0.0001 * step for step in range(260)], False),
        ([2.0] * 100 + [1.5] * 160, False),
        ([2.0] * 229, False),
    ],
    ids=["flat", "noise", "slow", "late", "too short"],
)
@pytest.mark.parametrize("resumed_at", [0, 15, 150])
def test_a_loss_that_does_not_fall_is_said_once(losses: list[float], is_said: bool, resumed_at: int) -> None:
    watch = flat_loss.FlatLossWatch(30, 1e-8, losses[:resumed_at])
    said = [watch.add_loss(step, loss) for step, loss in enumerate(losses, 1) if step > resumed_at]
    texts = [text for text in said if text]
    assert len(texts) == is_said
    if is_said:
        assert said.index(texts[0]) + resumed_at + 1 == 230
        assert "train.learning_rate=1e-08 is too low" in texts[0]


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
def test_a_loss_that_heals_or_is_noisy_has_not_diverged(losses: list[float]) -> None:
    assert diverged_at(losses) is None


def test_a_loss_that_rises_and_stays_up_ends_training() -> None:
    losses = [*CALM, *[7.0] * 200]
    end = diverged_at(losses)
    assert end is not None
    step, message = end
    assert len(CALM) + PATIENCE <= step <= len(CALM) + PATIENCE + WINDOW
    assert message.startswith("train.max_loss_rise=2.0: step ")
    assert diverged_at(losses, rise=None) is None


@pytest.mark.parametrize("resumed", [0, 10, 150, 230])
def test_a_resumed_run_ends_at_the_same_step(resumed: int) -> None:
    losses = [*CALM, *[7.0] * 200]
    end = diverged_at(losses)
    assert end is not None
    divergence = DivergenceDetector(2.0, losses[:resumed])
    with pytest.raises(DivergedError, match=f"step {end[0]}:"):
        for step in range(resumed, len(losses)):
            divergence.add_loss(step + 1, losses[step])


OVERRIDES = [
    "cluster.train.ranks_per_node=2", "cluster.train.gpus_per_node=0", "train.steps=8", "train.save_every=4",
    "train.global_batch=8", "train.eval_every=4", "train.log_every=4", "train.precision=fp32", "train.warmup_steps=0",
    "data.max_rows=120", "jobs=[preprocess,train]",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run folder, and what the terminal showed."""
    run = tmp_path_factory.mktemp("monitored") / "run"
    return run, ranks.run(f"run_dir={run}", *OVERRIDES, "train.profile=true", "train.profile_ranks=[0,1]")


@pytest.mark.slow
def test_a_run_reports_its_time_and_memory(trained: tuple[Path, str]) -> None:
    run, shown = trained
    steps = [line for line in metrics(run) if "loss" in line]
    assert all(line["tokens_per_s_per_rank"] == pytest.approx(line["tokens_per_s"] / 2, abs=0.1) for line in steps)
    assert not any("mfu" in line for line in steps)  # no peak is known of a CPU
    timed = [line for line in steps if "forward_s" in line]
    assert [line["step"] for line in timed] == [4, 8]
    for line in timed:
        assert all(line[f"{name}_s"] > 0 for name in PHASES)
        assert 0.1 < line["memory_gib_min"] <= line["memory_gib_median"] <= line["memory_gib_max"] < 4
    mean_step_s = sum(line["seconds"] for line in steps[:4]) / 4
    assert 0.5 * mean_step_s < sum(timed[0][f"{name}_s"] for name in PHASES) <= mean_step_s * 1.01
    assert sum("checkpoint_s" in line for line in metrics(run)) == 2
    assert "mesh      fsdp: 2 ranks on 1 node" in shown
    assert "took" in shown and "left 0:00:00" in shown


@pytest.mark.slow
def test_a_trace_has_the_phases_of_three_steps(trained: tuple[Path, str]) -> None:
    run, shown = trained
    for rank in (0, 1):
        [path] = (run / "profile").glob(f"*.rank-{rank}.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert sum(event.get("name") == "optimizer" and event.get("cat") == "user_annotation" for event in events) == 3
    assert "profile   " in shown


@pytest.mark.slow
def test_the_report_shows_the_finished_training(trained: tuple[Path, str]) -> None:
    run, _ = trained
    text = (run / "report.html").read_text(encoding="utf-8")
    charts = json.loads(text.partition('id="data">')[2].partition("</script>")[0])["charts"]
    assert [chart["title"] for chart in charts] == ["Loss", "Gradient norm", "Learning rate", "Speed", "Peak memory"]
    assert charts[0]["series"][0]["x"] == list(range(1, 9))
    for shown in ("8 of 8", "completed</span>", "1 node, 2 ranks on CPUs"):
        assert shown in text


@pytest.mark.proof
def test_a_loss_that_stays_up_ends_with_a_verdict_and_saves_nothing_after(tmp_path: Path) -> None:
    """The rows are trained in the order of their file: first some that are easy to learn, then random text."""
    generator, run = random.Random(0), tmp_path / "run"
    noise = ["".join(generator.choices(string.ascii_lowercase, k=24)) for _ in range(2000)]
    rows = [{"instruction": f"Greet guest {number}.", "output": "Welcome, and good day."} for number in range(500)]
    rows += [{"instruction": noise[2 * number], "output": noise[2 * number + 1]} for number in range(1000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"run_dir={run}", *OVERRIDES, "data=jsonl", f"data.path={path}", "data.order=file", "train.steps=180",
        "train.save_every=20", "train.eval_every=0", "data.max_rows=null", "train.max_loss_rise=1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, ranks.CLONE / "launch.py", *overrides],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "training has diverged" in done.stdout + done.stderr
    ended = max(line["step"] for line in metrics(run))
    saved = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    assert ended - 20 <= max(saved) < ended < 180
    assert f"{ended} of 180" in (run / "report.html").read_text(encoding="utf-8")
    (verdict,) = (run / "jobs/train").glob("attempt-*.json")
    assert json.loads(verdict.read_text())["status"] == "user_error"
