"""Rewrites RUN/report.html when a training has ended that could not do so itself: it was killed, or it has lost its node."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.run_folder import attempts

TRAINING = "training"
"""The state that the page has while the training runs."""


def settle(run: Path, verdict: Mapping[str, Any]) -> bool:
    """Write how the training has ended onto its page, if that still says that it runs. Returns whether the page was written.

    The page is of less worth than what is going on, so nothing is raised. A node's own Python, outside a container, may lack the
    packages that it takes; then `muster status` writes it later.
    """
    with suppress(Exception):
        progress = attempts.read_record(run / "report.json") or {}
        if progress.get("state") == TRAINING and (run / "report.html").stat().st_uid == os.getuid():
            _write(run, progress, verdict)
            return True
    return False


def _write(run: Path, progress: dict[str, Any], verdict: Mapping[str, Any]) -> None:
    from conf import resolve
    from conf.files import write_json, write_text
    from pages import report

    newest = attempts.newest_attempt(run / "jobs" / "train")
    ended = attempts.number(verdict.get("ended")) or attempts.last_sign(run / f"jobs/train/attempt-{newest}")
    texts = (verdict.get(name) for name in ("reason", "remedy", "next"))
    progress |= {
        "state": str(verdict["status"]),
        "ended": ended,
        "reason": "; ".join(str(text) for text in texts if text),
        "goes_on": verdict.get("requeued") is True,
    }
    page = report.render_html(resolve.load(run / "config.yaml"), run / "metrics.jsonl", report.Progress(**progress))
    write_text(run / "report.html", page)
    write_json(run / "report.json", progress)
