"""The chaos suite: `python -m tests.slurm.chaos` strikes trainings on the test cluster, and writes docs/resilience.md.

Each run is drawn from the seed: a kind of fault, a layout, a step, and whether it strikes twice. It must end by itself with the
metrics and weights of the run of its layout that nothing struck; or, where going on would be wrong, with the right verdict, and
then reach them once it is resumed. What is found is kept at once, so that `--resume` goes on where a suite was cut short.
"""

import argparse
import json
import os
import queue
import shutil
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from operator import sub
from pathlib import Path
from random import Random
from typing import Any

from launcher.run_folder import attempts
from tests.slurm import chaos_page, cluster, faults, runs
from tests.slurm.kinds import EVERY, KINDS, LAYOUTS, STEPS, Plan, draw, environment, words

LANES = ("n3,n4", "n1,n2")
"""The nodes that a run leaves to another one beside it."""
END_S = 300.0
"""A run that has not ended by itself this long after its last fault never will."""
RECOVERED, STOPPED, WRONG = "recovered", "stopped rightly", "wrong"


@dataclass
class Found:
    """What became of it."""

    faults: int = 0
    struck: list[int] = field(default_factory=list)
    what: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    lost: int = 0
    outcome: str = WRONG
    why: str = ""


class Suite:
    """Runs what was drawn, on a cluster that is up, in a work folder."""

    def __init__(self, work: Path, up: cluster.Cluster, seed: int) -> None:
        self.work, self.cluster, self.seed = work, up, seed
        self.results = work / "results.jsonl"
        self.hook = work / "hook"
        self.hook.mkdir(parents=True, exist_ok=True)
        (self.hook / "sitecustomize.py").write_text(faults.HOOK)
        self.lock = threading.Lock()
        self.lanes: queue.Queue[str] = queue.Queue()
        for lane in LANES:
            self.lanes.put(lane)

    def known(self) -> list[dict[str, Any]]:
        """What earlier calls have found."""
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def reference(self, layout: str) -> Path:
        """The run of a layout that nothing strikes; the first one also makes the rows of all."""
        run, rows = self.work / f"reference-{layout}", self.work / "reference-fsdp/data"
        if not (run / "whole").exists():
            shutil.rmtree(run, ignore_errors=True)
            if layout == LAYOUTS[0]:
                runs.complete(run, *words(layout), "jobs=[preprocess,train]")
            else:
                runs.start(run, *words(layout), "jobs=[train]")
                shutil.copytree(rows, run / "data")
                assert runs.finish(run)["train"].verdict["status"] == "completed"
            (run / "whole").touch()
        return run

    def strike(self, plan: Plan) -> None:
        """Run one plan to its end, and keep what was found."""
        alone = KINDS[plan.kind].alone
        lane = "" if alone else self.lanes.get()
        run = self.work / f"run-{plan.number}"
        began, found = time.monotonic(), Found()
        faults.clear(run)
        try:
            self._judge(plan, run, lane, found)
        except Exception as error:
            found.why = f"{type(error).__name__}: {error}"[:300]
            (self.work / f"run-{plan.number}.error").write_text(traceback.format_exc())
        finally:
            runs.command("cancel", run)
            if lane:
                self.lanes.put(lane)
        found.verdicts = [item["status"] for item in attempts.verdicts(run / "jobs/train")]
        if found.outcome != WRONG:
            faults.clear(run)  # a wrong one stays, to be looked at
        self._keep(plan, found, time.monotonic() - began)

    def _keep(self, plan: Plan, found: Found, seconds: float) -> None:
        line = asdict(plan) | asdict(found) | {"seed": self.seed, "seconds": round(seconds), "cores": os.cpu_count()}
        with self.lock, self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        at = " and ".join(map(str, found.struck))
        recovery = ", ".join(f"{item:.0f}" for item in found.recovery_s)
        said = f"{found.lost} steps lost, {recovery or '-'} s to the next step" if not found.why else found.why
        print(
            f"[{plan.number}] {plan.kind} {plan.layout} at step {at}: {found.outcome}, {said} ({seconds:.0f} s)",
            flush=True,
        )

    def _judge(self, plan: Plan, run: Path, lane: str, found: Found) -> None:
        kind, reference = KINDS[plan.kind], self.work / f"reference-{plan.layout}"
        scene = faults.Scene(run, self.cluster, Random(f"{self.seed} {plan.number}"))
        with ExitStack() as stack:
            more = [f"cluster.train.exclude='{lane}'"] if lane else []
            runs.start(run, *words(plan.layout), *kind.words, environment(kind, self.hook), "jobs=[train]", *more)
            shutil.copytree(reference / "data", run / "data")
            if plan.kind == "disk_full":
                stack.enter_context(faults.small_disk(run))
            spare = sum(self._one(scene, plan, step, found) for step in plan.steps)
            if kind.stops:
                verdict = runs.finish(run, END_S)["train"].verdict
                assert verdict["status"] == kind.stops, f"it ended as {verdict['status']}: {verdict['reason']}"
                faults.repair(scene, plan.kind)
                done = runs.command("resume", run)
                assert done.returncode == 0, done.stdout + done.stderr
            verdict = runs.finish(run, END_S)["train"].verdict
            assert verdict["status"] == "completed", f"it ended as {verdict['status']}: {verdict['reason']}"
            found.lost = faults.lost(run, STEPS)
            same = runs.curve(run) == runs.curve(reference), runs.fingerprints(run) == runs.fingerprints(reference)
            assert all(same), f"metrics and weights are those of the reference: {same}"
            allowed = kind.lost * EVERY * len(plan.steps) + spare
            assert found.lost <= allowed, f"{found.lost} steps lost, {allowed} may be"
            found.outcome = STOPPED if kind.stops else RECOVERED

    def _one(self, scene: faults.Scene, plan: Plan, step: int, found: Found) -> int:
        """Strike once, and wait until training goes on; returns steps that may be lost for a checkpoint on its way."""
        kind, run = KINDS[plan.kind], scene.run
        after = runs.step(run) + step if found.struck else step

        def done() -> bool:
            return bool(found.struck) and not runs.state.active_jobs(run)

        runs.until(lambda: (runs.step(run) >= after and len(scene.checkpoints) >= kind.checkpoints) or done(), END_S)
        if done():  # before it could be struck again
            return 0
        writing = any((run / "checkpoints").glob(".step-*.partial")) or plan.kind == "kill_in_save"
        number, at = scene.attempt, time.time()
        found.struck.append(runs.step(run))
        found.faults += 1
        found.what.append(kind.strike(scene))
        if plan.kind == "time_limit":  # it struck when that returned
            at = time.time()
        if not kind.stops:
            runs.until(lambda: pause(run, number, at, kind.restarts) is not None, END_S)
            found.recovery_s.append(round(pause(run, number, at, kind.restarts) or 0, 1))
        return EVERY if writing and kind.lost else 0


def pause(run: Path, number: int, at: float, restarts: bool) -> float | None:
    """Seconds without a step since `at`, when attempt `number` was struck; None while training does not go on.

    Where that attempt goes on, the longest pause between two of its steps until now; 0 where the run has ended.
    """
    folder = run / "jobs/train"
    newest = attempts.newest_attempt(folder) or 0
    times = [line["time"] for line in attempts.metrics(run)]
    if newest > number:
        since = attempts.begin_record(folder, newest).get("started", time.time())
        return min((moment - at for moment in times if moment > since), default=None)
    ending = restarts or (folder / f"attempt-{number}/hang.begun").exists()
    if (folder / f"attempt-{number}.json").exists():
        return None if runs.state.active_jobs(run) else 0.0
    after = [moment for moment in times if moment > at]
    return None if ending or not after else max(map(sub, after, [at, *after]))


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=60, help="at least this many (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--work", type=Path, default=runs.CLONE / "runs/chaos", help="folder of its runs (runs/chaos)")
    parser.add_argument("--resume", action="store_true", help="go on with the suite that lies in the work folder")
    parser.add_argument("--page", action="store_true", help="only write the page of what was found so far")
    options = parser.parse_args()
    work = options.work.absolute()
    if not (options.resume or options.page):
        shutil.rmtree(work, ignore_errors=True)
    if not options.page:
        cluster.down()  # with the jobs that a suite which was killed has left there
        up = cluster.up()
        os.environ["SLURM_CONF"] = str(up.conf)
        try:
            _strike_all(Suite(work, up, options.seed), draw(options.faults, options.seed, options.kinds))
        finally:
            up.down()
    found = [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]
    chaos_page.write(runs.CLONE / "docs/resilience.md", found)
    count, wrong = sum(item["faults"] for item in found), sum(item["outcome"] == WRONG for item in found)
    good = sum(item["faults"] for item in found if item["outcome"] != WRONG)
    print(f"RESULT faults={count} recovered={good} wrong={wrong}")
    return 1 if wrong else 0


def _strike_all(suite: Suite, plans: list[Plan]) -> None:
    known = {item["number"] for item in suite.known()}
    left = [plan for plan in plans if plan.number not in known]
    print(f"{len(plans)} runs with {sum(len(plan.steps) for plan in plans)} faults, {len(left)} runs to do", flush=True)
    for layout in LAYOUTS:
        suite.reference(layout)
    with ThreadPoolExecutor(len(LANES)) as pool:
        list(pool.map(suite.strike, (plan for plan in left if not KINDS[plan.kind].alone)))
    for plan in left:
        if KINDS[plan.kind].alone:
            suite.strike(plan)
    for item in suite.known():
        if item["outcome"] != WRONG:  # again: a watchdog that saw its ranks end may have written there since
            faults.clear(suite.work / f"run-{item['number']}")


if __name__ == "__main__":
    sys.exit(main())
