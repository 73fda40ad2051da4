"""Goes back to a chosen checkpoint of a run: moves the newer ones aside, and says what changes from there on."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from conf.files import write_text
from conf.schema import Config
from launcher.check.resume import has_trained
from launcher.run_folder.attempts import checkpoints

RECORDS = ("metrics.jsonl", "tracker.json")
"""Files that belong to the steps after the chosen checkpoint. Without tracker.json, trackers show a new run."""


def notes(stored: Config | None, config: Config) -> Iterator[str]:
    """A line for what a resume changes from its checkpoint on. `stored` is the config of the run so far."""
    run, step = Path(config.run_dir), config.train.resume_step
    newest = max(checkpoints(run), default=0)
    if step is not None:
        newer = ", ".join(map(str, _newer(run, step)))
        kept = f"; the newer ones ({newer}) and metrics.jsonl are kept in {_free(run)}" if newer else ""
        yield f"resume    from the checkpoint of step {step}{kept}"
    if stored is None or not has_trained(run) or stored.train.learning_rate == config.train.learning_rate:
        return
    before, now = stored.train.learning_rate, config.train.learning_rate
    after = f"after step {step or newest}" if step or newest else "from the first step on"
    yield f"changed   train.learning_rate from {before:g} to {now:g}: {after} the schedule is that of {now:g}"


def apply(config: Config) -> None:
    """Move what is newer than `train.resume_step` aside, and set that key to null: an attempt after this one must not go back."""
    run, step = Path(config.run_dir), config.train.resume_step
    config.train.resume_step = None
    if step is None or not (newer := _newer(run, step)):
        return
    saved, aside = checkpoints(run), _free(run)
    aside.mkdir()
    for name in RECORDS:
        if (run / name).exists():
            shutil.copy2(run / name, aside / name)
    for number in reversed(newer):  # the newest first: after an interruption the chosen one is still not the newest
        saved[number].rename(aside / saved[number].name)
    write_text(run / "checkpoints" / "latest", f"{saved[step].name}\n")
    (run / "tracker.json").unlink(missing_ok=True)


def _newer(run: Path, step: int) -> list[int]:
    return sorted(number for number in checkpoints(run) if number > step)


def _free(run: Path) -> Path:
    """The first of RUN/checkpoints/replaced-1, -2, ... that is not there."""
    number = 1
    while (run / "checkpoints" / f"replaced-{number}").exists():
        number += 1
    return run / "checkpoints" / f"replaced-{number}"
