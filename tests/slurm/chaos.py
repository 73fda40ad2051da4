"""The chaos suite: `python -m tests.slurm.chaos` injects faults into trainings and writes docs/resilience.md.

With `--kinds`, the page of the chosen faults goes into the work folder instead.

Kind of fault, layout, step and number of faults of each run are drawn from the seed. A run must end by itself with the metrics
and weights of the reference run, which has the same layout and no fault. If continuing would be wrong, it must end with the
right verdict, and reach these metrics and weights after it is resumed. Each result is written at once, so that `--resume` can
continue an interrupted suite.
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
from tests.slurm import chaos_page, cluster, faults, launch_faults, runs
from tests.slurm.kinds import KINDS, LAYOUTS, SAVE_EVERY, STEPS, Kind, PlannedRun, draw, environment, overrides

EXCLUDED_NODES = ("n3,n4", "n1,n2")
"""Two runs are under way at the same time. Each excludes the nodes of the other one."""
END_S = 300.0
"""A run that has not ended by itself this long after its last fault is wrong."""
BEGIN = "cluster.train.sbatch={begin: now+20}"
"""A job whose launch takes longer must not start before the suite has copied its data."""
RECOVERED, STOPPED, WRONG = "recovered", "stopped correctly", "wrong"


@dataclass
class Result:
    """What happened in a run. Its fields are written to results.jsonl."""

    faults: int = 0
    struck: list[int] = field(default_factory=list)
    """The steps at which the faults happened."""
    what: list[str] = field(default_factory=list)
    """The random choices of each fault, for example which rank."""
    verdicts: list[str] = field(default_factory=list)
    """The status of each attempt."""
    recovery_s: list[float] = field(default_factory=list)
    """Seconds without a step after each fault."""
    lost: int = 0
    """Steps that were computed again."""
    outcome: str = WRONG
    why: str = ""
    """Why it is wrong."""


class Suite:
    """Executes planned runs in the folder `work`, on a cluster that is up."""

    def __init__(self, work: Path, running: cluster.Cluster, seed: int) -> None:
        self.work, self.cluster, self.seed = work, running, seed
        self.results = work / "results.jsonl"
        self.hook = work / "hook"
        self.hook.mkdir(parents=True, exist_ok=True)
        (self.hook / "sitecustomize.py").write_text(faults.HOOK)
        self.lock = threading.Lock()
        self.free_halves: queue.Queue[str] = queue.Queue()
        """The halves of the cluster that no run uses now, as the nodes to exclude."""
        for nodes in EXCLUDED_NODES:
            self.free_halves.put(nodes)

    def known_results(self) -> list[dict[str, Any]]:
        """Results that were written so far, also by earlier calls."""
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def reference(self, layout: str) -> Path:
        """The run of a layout without faults. The first one also preprocesses the data of all runs."""
        run, data = self.work / f"reference-{layout}", self.work / "reference-fsdp/data"
        if not (run / "whole").exists():
            shutil.rmtree(run, ignore_errors=True)
            if layout == LAYOUTS[0]:
                runs.complete(run, *overrides(layout), "jobs=[preprocess,train]")
            else:
                runs.start(run, *overrides(layout), "jobs=[train]")
                shutil.copytree(data, run / "data")
                assert runs.final_verdict(run, "train")["status"] == "completed"
            (run / "whole").touch()
        return run

    def execute(self, planned: PlannedRun) -> None:
        """Execute one planned run to its end and write its result."""
        excluded = "" if KINDS[planned.kind].alone else self.free_halves.get()
        run = self.work / f"run-{planned.number}"
        began, result = time.monotonic(), Result()
        faults.clear(run)
        try:
            self._execute(planned, run, excluded, result)
        except Exception as error:
            result.why = f"{type(error).__name__}: {error}"[:300]
            (self.work / f"run-{planned.number}.error").write_text(traceback.format_exc())
        finally:
            runs.command("cancel", run)
            if excluded:
                self.free_halves.put(excluded)
        result.verdicts = [verdict["status"] for verdict in attempts.verdicts(run / "jobs/train")]
        if result.outcome != WRONG:
            faults.clear(run)  # the folder of a wrong run is kept for inspection
        self._write(planned, result, time.monotonic() - began)

    def _write(self, planned: PlannedRun, result: Result, seconds: float) -> None:
        more = {"seed": self.seed, "seconds": round(seconds), "cores": os.cpu_count()}
        with self.lock, self.results.open("a") as file:
            file.write(json.dumps(asdict(planned) | asdict(result) | more) + "\n")
        steps = " and ".join(map(str, result.struck))
        recovery = ", ".join(f"{recovery_s:.0f}" for recovery_s in result.recovery_s)
        details = result.why or f"{result.lost} steps lost, {recovery or '-'} s to the next step"
        name = f"[{planned.number}] {planned.kind} {planned.layout} at step {steps}"
        print(f"{name}: {result.outcome}, {details} ({seconds:.0f} s)", flush=True)

    def _execute(self, planned: PlannedRun, run: Path, excluded: str, result: Result) -> None:
        """Start the run, inject its faults, and compare it with the reference. Raises AssertionError if it is wrong."""
        kind, reference = KINDS[planned.kind], self.work / f"reference-{planned.layout}"
        scene = faults.Scene(run, self.cluster, Random(f"{self.seed} {planned.number}"))
        with ExitStack() as stack:
            more = [f"cluster.train.exclude='{excluded}'"] if excluded else []
            hook = environment(kind, self.hook)
            words = [*overrides(planned.layout), *kind.overrides, hook, "jobs=[train]", *more]
            if kind.launch:
                self._launch(kind, run, words, result)
            else:
                runs.start(run, *words)
            shutil.copytree(reference / "data", run / "data")
            if planned.kind == "disk_full":
                stack.enter_context(faults.small_disk(run))
            unsaved = sum(self._inject(scene, planned, step, result) for step in planned.steps if kind.inject)
            if kind.final_verdict:
                verdict = runs.final_verdict(run, "train", END_S)
                assert verdict["status"] == kind.final_verdict, f"it ended as {verdict['status']}: {verdict['reason']}"
                faults.repair(scene, planned.kind)
                done = runs.command("resume", run)
                assert done.returncode == 0, done.stdout + done.stderr
            verdict = runs.final_verdict(run, "train", END_S)
            assert verdict["status"] == "completed", f"it ended as {verdict['status']}: {verdict['reason']}"
            result.lost = faults.lost_steps(run, STEPS)
            same = runs.curve(run) == runs.curve(reference), runs.fingerprints(run) == runs.fingerprints(reference)
            assert all(same), f"(metrics, weights) equal those of the reference: {same}"
            allowed = kind.lost_intervals * SAVE_EVERY * len(planned.steps) + unsaved
            assert result.lost <= allowed, f"{result.lost} steps lost, {allowed} are allowed"
            result.outcome = STOPPED if kind.final_verdict else RECOVERED

    def _launch(self, kind: Kind, run: Path, words: list[str], result: Result) -> None:
        """Launch a run in the presence of a fault. Exactly one job may be queued afterwards."""
        assert kind.launch is not None
        result.faults, result.struck = 1, [0]
        done = kind.launch(self.cluster, [*runs.TWO_BY_TWO, f"run_dir={run}", *words, BEGIN])
        assert done.returncode == 0, done.stdout + done.stderr
        ids = launch_faults.jobs_in(run)
        assert ids == [runs.job_id(run, "train")], f"jobs {ids} are queued"

    def _inject(self, scene: faults.Scene, planned: PlannedRun, step: int, result: Result) -> int:
        """Inject one fault and wait until training goes on.

        Returns how many more steps may be lost because a checkpoint was being written.
        """
        kind, run = KINDS[planned.kind], scene.run
        at_step = runs.step(run) + step if result.struck else step

        def has_ended() -> bool:
            return bool(result.struck) and not runs.is_active(run)

        def is_ready() -> bool:
            enough = runs.step(run) >= at_step and len(scene.checkpoints) >= kind.min_checkpoints
            return enough or has_ended()

        runs.wait_until(is_ready, END_S)
        if has_ended():  # the run was done before its second fault
            return 0
        writing = any((run / "checkpoints").glob(".step-*.partial")) or planned.kind == "kill_in_save"
        attempt, began = scene.attempt, time.time()
        result.struck.append(runs.step(run))
        result.faults += 1
        assert kind.inject is not None
        result.what.append(kind.inject(scene))
        if planned.kind == "time_limit":  # this one waits for the limit: the fault happens when it returns
            began = time.time()
        if not kind.final_verdict:

            def goes_on() -> bool:
                return pause(run, attempt, began, kind.ends_attempt) is not None

            runs.wait_until(goes_on, END_S)
            result.recovery_s.append(round(pause(run, attempt, began, kind.ends_attempt) or 0, 1))
        return SAVE_EVERY if writing and kind.lost_intervals else 0


def pause(run: Path, attempt: int, began: float, ends_attempt: bool) -> float | None:
    """Seconds without a step after the fault at the Unix time `began`, in attempt number `attempt`.

    None while training does not go on yet. If the attempt itself goes on, it is the longest pause between its steps so far; 0
    if the run has ended.
    """
    folder = run / "jobs/train"
    newest = attempts.newest_attempt(folder) or 0
    times = [line["time"] for line in attempts.metrics(run)]
    if newest > attempt:
        since = attempts.begin_record(folder, newest).get("started", time.time())
        return min((moment - began for moment in times if moment > since), default=None)
    is_ending = ends_attempt or (folder / f"attempt-{attempt}/hang.begun").exists()
    if (folder / f"attempt-{attempt}.json").exists():
        return None if runs.is_active(run) else 0.0
    after = [moment for moment in times if moment > began]
    return None if is_ending or not after else max(map(sub, after, [began, *after]))


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=80, help="minimum number of faults (80)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (0)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="kinds of faults (all)"
    )
    parser.add_argument("--work", type=Path, default=runs.CLONE / "runs/chaos", help="folder for the runs (runs/chaos)")
    parser.add_argument("--resume", action="store_true", help="continue the interrupted suite in the work folder")
    parser.add_argument("--page", action="store_true", help="only write the page from the results so far")
    options = parser.parse_args()
    work = options.work.absolute()
    if not (options.resume or options.page):
        shutil.rmtree(work, ignore_errors=True)
    if not options.page:
        cluster.down()  # removes the jobs of a suite that was killed
        running = cluster.up()
        os.environ["SLURM_CONF"] = str(running.conf)
        try:
            _execute_all(Suite(work, running, options.seed), draw(options.faults, options.seed, options.kinds))
        finally:
            running.down()
    results = [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]
    whole = set(options.kinds) == set(KINDS)
    page = (runs.CLONE / "docs" if whole else work) / "resilience.md"
    chaos_page.write(page, results)
    print(f"page      {page}")
    count, wrong = sum(result["faults"] for result in results), sum(result["outcome"] == WRONG for result in results)
    good = sum(result["faults"] for result in results if result["outcome"] != WRONG)
    print(f"RESULT faults={count} recovered={good} wrong={wrong}")
    return 1 if wrong else 0


def _execute_all(suite: Suite, planned: list[PlannedRun]) -> None:
    known = {result["number"] for result in suite.known_results()}
    left = [run for run in planned if run.number not in known]
    print(
        f"{len(planned)} runs with {sum(len(run.steps) for run in planned)} faults, {len(left)} runs to do", flush=True
    )
    for layout in LAYOUTS:
        if layout == LAYOUTS[0] or layout in {run.layout for run in left}:  # the first one has the data of all
            suite.reference(layout)
    with ThreadPoolExecutor(len(EXCLUDED_NODES)) as pool:
        list(pool.map(suite.execute, (run for run in left if not KINDS[run.kind].alone)))
    for run in left:
        if KINDS[run.kind].alone:
            suite.execute(run)
    for result in suite.known_results():
        if result["outcome"] != WRONG:  # again: a watchdog may have written there while its ranks ended
            faults.clear(suite.work / f"run-{result['number']}")


if __name__ == "__main__":
    sys.exit(main())
