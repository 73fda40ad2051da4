"""Takes the pictures of docs/pages and checks the pages in headless Chromium: `python -m tests.pages.screenshots [RUNS]`.

Trains the demo, three learning rates, and one of their models further, all on CPUs, into the folder RUNS. What is there already is
not trained again. `make screenshots` installs the browser first.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT

PICTURES = ROOT / "docs/pages"
MODULES = ROOT / ".browser"
RATES = ("1e-3", "4e-3", "1e-2")
BASE = "4e-3"
"""The learning rate of the run whose model is trained further, for answers of before and after."""
PROMPTS = (
    (
        "Please tell me what the command squeue does.",
        "The command squeue shows the jobs that wait or run in the queue.",
    ),
    ("Which city is the capital city of Japan?", "The capital city of Japan is Tokyo."),
)
LIMIT_S = 3600
"""Of one command, on a machine that does other things too."""


def main() -> int:
    if len(sys.argv) > 1:
        return pictures(Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory(prefix="muster-pages-") as folder:
        return pictures(Path(folder))


def pictures(folder: Path) -> int:
    """Train what is missing, write the pictures, and return the exit code of the browser's checks."""
    train(folder / "demo")
    for rate in RATES:
        jobs = "[preprocess,train,consolidate]" if rate == BASE else "[preprocess,train]"
        words = (f"jobs={jobs}", "train.steps=60", "train.eval_every=10", f"train.learning_rate={rate}")
        train(folder / "sweep" / f"lr-{rate}", *words)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": ask, "reference": answer}) + "\n" for ask, answer in PROMPTS))
    of_base = (f"model.source={folder / f'sweep/lr-{BASE}/model'}", "model=hub", "generate.compare_base=true")
    answers = (f"generate.prompts={prompts}", "generate.max_new_tokens=40")
    train(folder / "tuned", *of_base, *answers, "train.steps=60", "train.learning_rate=3e-3")
    compare = folder / "sweep/compare.html"
    run(sys.executable, "-m", "launcher", "compare", str(folder / "sweep"), "--out", str(compare))

    pages = {
        "report": folder / "demo/report.html",
        "preview": folder / "demo/data/preview.html",
        "generations": folder / "tuned/generations.html",
        "compare": compare,
    }
    new = folder / "pictures"
    new.mkdir(exist_ok=True)
    for name, path in pages.items():  # without the paths of this machine
        text = path.read_text(encoding="utf-8").replace(str(folder), "runs").replace(str(ROOT), "~/muster")
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    named = [f"{name}={folder / name}.html" for name in pages]
    checked = subprocess.run(
        ["node", str(ROOT / "tests/pages/browser.mjs"), str(MODULES), str(new), *named], check=False
    )
    run("pngquant", "--force", "--ext", ".png", "--speed", "1", "96", *map(str, sorted(new.glob("*.png"))))
    PICTURES.mkdir(exist_ok=True)
    for path in new.glob("*.png"):
        shutil.copyfile(path, PICTURES / path.name)
    return checked.returncode


def train(run_dir: Path, *words: str) -> None:
    """Launch a run with this folder, unless it is there. One that was interrupted goes on."""
    if not (run_dir / "done").exists():
        print(f"training {run_dir.name}", flush=True)
        run(sys.executable, "launch.py", f"name={run_dir.name}", f"run_dir={run_dir}", *words)
        (run_dir / "done").touch()


def run(*command: str) -> None:
    """Run a command in the clone; show what it printed if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
