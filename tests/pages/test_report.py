"""RUN/report.html: what it says of a run and draws, on run folders made by hand."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from conf.files import write_json
from conf.schema import Config
from pages.report import Progress, render_html
from tests.conftest import Compose, put
from tests.pages.html import EVIL, parsed


def line(step: int, **more: Any) -> dict[str, Any]:
    rates = {"tokens_per_s": 200.0, "tokens_per_s_per_rank": 100.0}
    return {
        "step": step,
        "loss": 8 / step,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        **rates,
        "time": 1000.0 + step,
    } | more


LINES = [
    {"step": 0, "eval_loss": 8.5, "time": 999.0},
    *(line(step) for step in range(1, 9)),
    line(
        9, left_s=90, memory_gib_min=1.0, memory_gib_max=2.0, data_s=0.1, forward_s=0.2, backward_s=0.6, optimizer_s=0.1
    ),
    {"step": 9, "eval_loss": 0.875, "time": 1010.0},
]


@pytest.fixture
def config(compose: Compose, tmp_path: Path) -> Config:
    words = ("model=llama8b", "adapter=lora", "pipeline=checked", "train.global_batch=8", "train.learning_rate=3e-4")
    return put(compose(*words), {"name": "tiny", "run_dir": str(tmp_path)})


def page(config: Config, lines: list[dict[str, Any]] = LINES, *, state: str = "training") -> str:
    path = Path(config.run_dir) / "metrics.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))
    return render_html(config, path, Progress(state, 18, 2, "1 node, 2 ranks on NVIDIA H200", ["step 3: slow"]))


def data_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    return found


def texts_of(text: str) -> str:
    return " ".join(" ".join(parsed(text).texts).split())


def test_the_page_has_the_state_and_figures_of_the_run(config: Config) -> None:
    write_json(Path(config.run_dir) / "jobs/train/attempt-1/begin.json", {"started": 900.0, "host": "n1"})
    shown = texts_of(page(config))
    for text in (
        "tiny training",
        "step 9 of 18",
        "training loss 0.8889",
        "held-out loss 0.8750",
        "best held-out loss 0.8750 at 9",
        "tokens/s, all ranks 200",
        "learning rate 1.00e-03",
        "time left 0:01:30",
        "ends about",
        "step 3: slow",
        "refresh every 30 s",
        "1 node, 2 ranks on NVIDIA H200",
        "meta-llama",
        "lora, r 16, alpha 32",
        "0.0003 peak, cosine",
        "8 rows a step",
    ):
        assert text in shown, text


def test_a_finished_page_does_not_refresh(config: Config) -> None:
    text = page(config, state="completed")
    assert "refresh every" not in text
    assert "time left" not in text
    assert 'name="refresh"' not in text
    assert '<span class="pill good">completed</span>' in text


def test_the_charts_have_axes_units_and_scales(config: Config) -> None:
    charts = {chart["title"]: chart for chart in data_of(page(config))["charts"]}
    assert {title: (chart["axis"], chart["log"]) for title, chart in charts.items()} == {
        "Loss": ("nats per token", False),
        "Gradient norm": ("norm", False),
        "Learning rate": ("learning rate", False),
        "Speed": ("tokens/s per rank", False),
        "Peak memory": ("GiB", False),
    }
    [training, held_out] = charts["Loss"]["series"]
    assert (training["x"], training["y"][:2]) == (list(range(1, 10)), [8.0, 4.0])
    assert (held_out["x"], held_out["y"], held_out["dots"]) == ([0, 9], [8.5, 0.875], True)
    falling = [line(step, loss=1 / step) for step in range(1, 101)]
    assert data_of(page(config, falling))["charts"][0]["log"]


def test_attempts_are_a_timeline(config: Config) -> None:
    folder = Path(config.run_dir) / "jobs/train"
    for number, started in ((1, 1000.0), (2, 2000.0)):
        write_json(folder / f"attempt-{number}/begin.json", {"started": started, "host": f"n{number}", "resumed": 4})
    ended = {
        "status": "preempted",
        "reason": "Slurm asked",
        "started": 1000.0,
        "ended": 1600.0,
        "step": 5,
        "host": "n1",
    }
    write_json(folder / "attempt-1.json", ended)
    shown = texts_of(page(config, state="stopped"))
    assert re.search(r"1 \S+ \S+ \S+ 0:10:00 preempted 4 5 n1 Slurm asked", shown)
    assert re.search(r"2 \S+ \S+ \S+ \S+ stopped 4 9 n2", shown)


def test_links_lead_to_the_other_pages(config: Config) -> None:
    (Path(config.run_dir) / "data").mkdir()
    assert "preview.html" not in page(config)
    (Path(config.run_dir) / "data/preview.html").write_text("x")
    links = [values["href"] for tag, values in parsed(page(config)).tags if tag == "a"]
    assert links == ["data/preview.html", "generations.html"]


def test_a_page_without_a_step_says_so(config: Config) -> None:
    assert "step 0 of 18" in texts_of(page(config, []))


def test_a_long_training_makes_a_small_page(config: Config) -> None:
    text = page(config, [line(step, mfu=0.4, memory_gib_max=step / 7) for step in range(1, 20_001)])
    assert len(text.encode()) < 300_000
    [loss] = data_of(text)["charts"][0]["series"]
    assert loss["x"][-1] == 20_000
    assert len(loss["x"]) <= 600


def test_nothing_of_a_run_is_markup(config: Config) -> None:
    run = Path(config.run_dir)
    put(config, {"name": EVIL, "model.name": EVIL, "model.source": EVIL, "data.path": EVIL, "data.chat_template": EVIL})
    write_json(
        run / "data/data.json", {"sets": {EVIL: {}}, "train": {"samples": 1, "tokens": 2}, "validation": {"samples": 0}}
    )
    (run / "config.yaml").write_text(f"name: {EVIL}</pre></script>")
    write_json(run / "jobs/train/attempt-1/begin.json", {"started": 900.0, "host": EVIL})
    text = page(config)
    found = parsed(text)
    assert not [tag for tag, _ in found.tags if tag in ("img", "iframe", "link")]
    assert [values for tag, values in found.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert "".join(found.texts).count(EVIL) >= 8
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
