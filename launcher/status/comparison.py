"""Compares runs: their results, speed and cost, the keys that differ, and their curves. Reads run folders alone, and no Slurm."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError
from conf.resolve import flat
from launcher.run_folder.attempts import metrics_line
from launcher.status import find
from pages import attempts
from pages.curves import Line, Point, median, number, points

MOST_LINES = 800
"""Lines of a metrics.jsonl that are parsed beside those of evaluations. Of a longer one, every second (third, ...) line is."""
OWN_KEYS = ("name", "run_dir", "jobs")
"""Keys that say nothing about how a run trains."""
FIRST = ("train.", "adapter.", "model.", "data.", "parallel.")
"""Sections of the config that come first in a list of keys."""
NOT_THERE = "(not there)"
NO_VERDICT = "no verdict yet"
"""The status of an attempt that runs."""
HELD_OUT_KEYS = (
    *("model.source", "model.tokenizer", "data.path", "data.sets", "data.format", "data.fields"),
    *("data.chat_template", "data.mask", "data.train_on", "data.validation", "data.max_length"),
)
"""Beginnings of keys that change which tokens are held out, or how a text is divided into them."""


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison. What is not known is None."""

    name: str
    """The shortest part of its path that no other run has."""
    folder: Path
    status: str
    """The verdict on the newest attempt of the training."""
    config: Mapping[str, str]
    """Values by key, as in config.yaml."""
    lines: list[Line]
    """Lines of metrics.jsonl: all evaluations, and one step in `every`."""
    every: int

    @property
    def is_open(self) -> bool:
        """Whether it trains, or was killed without a verdict."""
        return self.status == NO_VERDICT

    @cached_property
    def last(self) -> Point | None:
        """(step, training loss) of the last step."""
        return next((found[0] for line in reversed(self.lines) if (found := points([line], "loss"))), None)

    @cached_property
    def steps(self) -> int | None:
        """The steps that the config asks for; None if it counts epochs."""
        text = self.config.get("train.steps", "")
        return int(text) if text.isdecimal() else None

    @cached_property
    def best(self) -> Point | None:
        """(step, value) of the lowest held-out loss."""
        return min(points(self.lines, "eval_loss"), key=lambda point: point[1], default=None)

    @cached_property
    def tokens_per_s(self) -> float | None:
        """The median step's, of all ranks."""
        return median(self.lines, "tokens_per_s")

    @cached_property
    def gpu_hours(self) -> float | None:
        """Of all attempts of the training, also of what restarts have lost. None on CPUs, and before the first attempt."""
        gpus = self.config.get("cluster.train.gpus_per_node", "")
        nodes = self.config.get("cluster.train.nodes", "")
        found = attempts.read(self.folder)
        if not found or not (gpus.isdecimal() and nodes.isdecimal() and int(gpus)):
            return None
        ends = [item.started for item in found[1:]] + [float("inf")]
        pairs = zip(found, ends, strict=True)
        return sum(self._rank_seconds(item, end, int(gpus) * int(nodes)) for item, end in pairs) / 3600

    def _rank_seconds(self, attempt: attempts.Attempt, next_start: float, gpus: int) -> float:
        """GPUs times seconds of one attempt. A rank drives one GPU, and a resumed run may have another number of them."""
        within = [
            (time, line)
            for line in self.lines
            if (time := number(line.get("time"))) is not None and attempt.started <= time < next_start
        ]
        # without a verdict (it runs, or was killed): up to the last line that it wrote
        ended = attempt.ended or max((time for time, _ in within), default=attempt.started)
        ranks = (
            attempt.gpus if attempt.gpus is not None else max((_ranks(line) for _, line in within), default=0) or gpus
        )
        return max(0.0, ended - attempt.started) * ranks

    def as_json(self, cost: float | None) -> dict[str, Any]:
        """What is known, for scripts. cost: of a GPU-hour."""
        best, hours = self.best, self.gpu_hours
        return {
            "run": str(self.folder),
            "name": self.name,
            "status": self.status,
            "step": self.last and self.last[0],
            "steps": self.steps,
            "loss": self.last and self.last[1],
            "best_held_out_loss": best and best[1],
            "best_step": best and best[0],
            "tokens_per_s": self.tokens_per_s,
            "gpu_hours": hours,
            "cost": None if hours is None or cost is None else hours * cost,
        }


def read(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs in these folders, each of which is a run or has runs below it. Raises RunError."""
    found: list[Path] = []
    for folder in folders:
        runs = [folder] if (folder / "config.yaml").is_file() else list(find.runs_below(folder))
        if not runs:
            raise RunError(Problem("RUN", folder, "is not a run folder, and has none below it: it has no config.yaml"))
        found += [run for run in runs if run not in found]
    if len(found) < 2:
        raise RunError(Problem("RUN", found[0], "is only one run: name at least two, or a folder that has several"))
    return [_read(run, name) for run, name in zip(found, _names(found), strict=True)]


def differing_keys(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """The values of each key that is not the same in all runs, in the order of the runs. What matters most comes first."""
    found = dict.fromkeys(key for run in runs for key in run.config if key not in OWN_KEYS)
    keys = sorted(found, key=lambda key: next((n for n, name in enumerate(FIRST) if key.startswith(name)), len(FIRST)))
    values = {key: [run.config.get(key, NOT_THERE) for run in runs] for key in keys}
    return {key: of_key for key, of_key in values.items() if len(set(of_key)) > 1}


def caution(keys: Mapping[str, Any]) -> str:
    """Why held-out losses of the runs cannot be compared; empty if they can."""
    found = [key for key in keys if key.startswith(HELD_OUT_KEYS)]
    if not found:
        return ""
    return f"held-out losses may be of other tokens and then cannot be compared: the runs differ in {', '.join(found)}"


def best_run(runs: Sequence[ComparedRun]) -> ComparedRun | None:
    """The run with the lowest held-out loss."""
    evaluated = [(run.best[1], index) for index, run in enumerate(runs) if run.best]
    return runs[min(evaluated)[1]] if evaluated else None


def _read(run: Path, name: str) -> ComparedRun:
    found = attempts.read(run)
    status = "not started"
    if found:
        status = "ended early" if found[-1].ended_early else found[-1].status or NO_VERDICT
    return ComparedRun(name, run, status, _config(run / "config.yaml"), *_lines(run / "metrics.jsonl"))


def _ranks(line: Line) -> int:
    """How many ranks made a step; 0 if the line does not tell."""
    of_all, of_one = number(line.get("tokens_per_s")), number(line.get("tokens_per_s_per_rank"))
    return round(of_all / of_one) if of_all and of_one else 0


def _names(runs: Sequence[Path]) -> list[str]:
    """The name of each folder; its path below their common folder where two have the same name."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [os.path.relpath(run, os.path.commonpath([run.parent for run in runs])) for run in runs]


def _config(path: Path) -> dict[str, str]:
    """Values by dotted key. OmegaConf would take far longer."""
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        return {key: _as_yaml(value) for key, value in flat(content if isinstance(content, dict) else {}).items()}
    except (FileNotFoundError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise RunError(Problem("RUN", path, f"cannot be read: {str(error).splitlines()[0]}")) from error


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _lines(path: Path) -> tuple[list[Line], int]:
    try:
        texts = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 1
    every, last = -(-len(texts) // MOST_LINES) or 1, len(texts) - 1
    chosen = [text for n, text in enumerate(texts) if n % every == 0 or n == last or b'"eval_loss"' in text]
    return [line for text in chosen if (line := metrics_line(text.decode(errors="replace"))) is not None], every
