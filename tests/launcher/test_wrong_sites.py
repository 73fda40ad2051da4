"""Two hundred wrong sites: random values of every cluster key. Each is refused in words, or its scripts do what Muster says.

No value becomes a command or another option of sbatch, no option makes Slurm lose a job, and nothing ends in a traceback.
"""

import random
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from conf.errors import UserError
from conf.schema import Config
from conf.schema_cluster import Cluster
from launcher import sbatch_options, slurm
from launcher.check import localize, rules
from launcher.check.observe import Facts
from launcher.plan import plan
from launcher.status import pending
from launcher.status.state import JobState
from launcher.submit import preview, render
from launcher.supervise import rendezvous
from tests.conftest import Compose, put, tool

SITES = 200
CANARY = "touch canary"
TEXTS = [
    f"$({CANARY})", f"`{CANARY}`", f"; {CANARY};", f"' ; {CANARY} ; '", f'"; {CANARY}; "', f"x\n{CANARY}",
    f"x\n#SBATCH --wrap='{CANARY}'",
    f"&& {CANARY} #", f"| {CANARY}", f"${{x:-$({CANARY})}}", f"\\\n{CANARY}", f"x\r{CANARY}", "%j", "~", "*", "--", "-",
    "--wrap=id", "a b",
    "$HOME/x", "${USER}", "/tmp", "/a:/b:ro", "/a,/b", "é", "\u2028", "0", "-1", "true", "gpu", "n[1-4]", "gpu:a100:8",
    "afterok:1",
    "{host}", "$", "a.sif", "a.sqsh", "nvcr.io#x", "\0", "'", '"', "#", "=", "A" * 5000,
]  # fmt: skip
NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 60, 1440, 65536, 10**12]
OPTIONS = [
    *sorted(sbatch_options.KNOWN),
    *sbatch_options.SHORT,
    *TEXTS,
    "--gres",
    "GRES",
    "cpus_per_task",
    "outp",
    "a-plugin",
]


def keys(section: type, prefix: str) -> dict[str, Any]:
    """Every dotted key of a section with its type; sections inside it are not keys."""
    found: dict[str, Any] = {}
    hints = get_type_hints(section)
    for item in fields(section):
        hint = hints[item.name]
        inner = isinstance(hint, type) and is_dataclass(hint)
        found |= keys(hint, f"{prefix}{item.name}.") if inner else {f"{prefix}{item.name}": hint}
    return found


KEYS = {
    key: hint for key, hint in keys(Cluster, "cluster.").items() if key not in ("cluster.setup", "cluster.executor")
}
"""All but lines of the user's own shell."""


def value(key: str, hint: Any, choose: random.Random) -> Any:
    """A value of the type that the schema gives to a key, most often a wrong one."""
    text = choose.choice(TEXTS)
    names = OPTIONS if key.endswith("sbatch") else ["MINE", "HF_HOME", "NCCL_DEBUG", "MASTER_ADDR", "IFS", "RANK", text]
    enums = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Enum)]
    if enums:
        return choose.choice(list(enums[0]))
    made: dict[str, Callable[[], Any]] = {
        "list": lambda: [choose.choice(TEXTS) for _ in range(choose.randrange(3))],
        "dict": lambda: (
            {choose.choice(names): choose.choice(TEXTS) for _ in range(3)}
            if key.endswith("environment")
            else {choose.choice(names): choose.choice([text, text, "True", None])}
        ),
        "bool": lambda: choose.random() < 0.5,
        "int": lambda: choose.choice(NUMBERS),
        "float": lambda: choose.choice(NUMBERS) / 2,
        "str": lambda: text,
    }
    kind = next(kind for kind in made if kind in str(hint))
    return None if "None" in str(hint) and kind != "dict" and choose.random() < 0.2 else made[kind]()


def wrong_site(compose: Compose, number: int) -> Config:
    """The config of one site. Site K has a wrong value of key K, and of up to two more keys."""
    choose = random.Random(number)
    chosen = {list(KEYS)[number % len(KEYS)], *choose.sample([*KEYS, "cluster.environment"], choose.randrange(4))}
    config = compose("cluster=slurm", "model=llama8b", "pipeline=train")
    put(config, {"cluster.python": "./python"})
    return put(config, {key: value(key, KEYS[key], choose) for key in sorted(chosen)})


@pytest.fixture(scope="module")
def sites(compose: Compose) -> list[tuple[Config, list[str]]]:
    """Each site with what the checks say about it."""
    found = []
    for number in range(SITES):
        config = wrong_site(compose, number)
        try:
            localize.localize(config, 0)
            problems = [str(problem) for problem in rules.problems(config, Facts())]
        except UserError as error:
            problems = [str(error)]
        found.append((config, problems))
    return found


def test_every_refusal_names_a_key_and_says_what_to_do(sites: list[tuple[Config, list[str]]]) -> None:
    refused = [line for _, problems in sites for line in problems]
    assert len(refused) > SITES / 2
    for line in refused:
        assert re.match(r"[\w.\[\]=-]+", line), line
        assert re.search(
            r"(?i)\b(set|write|use|remove|choose|add|raise|lower|must|needs|name|type|put|continue)\b", line
        ), line


def accepted(sites: list[tuple[Config, list[str]]]) -> list[Config]:
    found = [config for config, problems in sites if not problems]
    assert len(found) > SITES / 10
    return found


def test_no_value_becomes_another_option_of_sbatch(sites: list[tuple[Config, list[str]]]) -> None:
    for config in accepted(sites):
        for job in plan(config):
            lines = render.sbatch_text(config, job, ["7"]).split("\n")
            first = lines.index("# setup")
            directives = [line for line in lines[3:first] if line]
            assert all(line.startswith("#SBATCH --") for line in directives), directives
            words = [shlex.split(line.removeprefix("#SBATCH ")) for line in directives]
            assert all(len(word) == 1 for word in words), words
            options = dict(word[0].removeprefix("--").partition("=")[::2] for word in words)
            assert len(options) == len(words)
            assert not set(options) & {
                "quiet",
                "parsable",
                "test-only",
                "wait",
                "array",
                "clusters",
                "wrap",
                "help",
                "usage",
            }
            assert options["job-name"] == f"{config.name}/{job.name}"
            assert (options["nodes"], options["chdir"]) == (str(job.resources.nodes), f"{config.run_dir}/code")
            assert options["output"].startswith(f"{config.run_dir}/jobs/{job.name}/")
            assert "afterok:7" in options["dependency"]


def test_no_value_becomes_a_command(sites: list[tuple[Config, list[str]]], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": "exit 0", "sbatch": "echo 1", "python": "echo MUSTER_ATTEMPT=1; echo ready"}.items():
        for folder in (tmp_path, tmp_path / "bin"):
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
    scripts = []
    for number, config in enumerate(accepted(sites)):
        [job] = [job for job in plan(config) if job.name == "train"]
        text = render.script_text(config, job, Path("/x")) + "\n" + render.chain_text(config, [job])
        (tmp_path / f"{number}.sh").write_text(text)
        scripts.append(f"( . ./{number}.sh ) > {number}.log 2>&1 < /dev/null")
    (tmp_path / "all.sh").write_text("module() { :; }\n" + "\n".join(scripts) + f"\n{CANARY}-of-the-test\n")
    environ = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "USER": f"$({CANARY})"}
    done = subprocess.run(
        [tool("bash"), "all.sh"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    assert [path.name for path in tmp_path.rglob("canary*")] == ["canary-of-the-test"]


def test_the_plan_of_an_accepted_site_can_be_shown(sites: list[tuple[Config, list[str]]]) -> None:
    for config in accepted(sites):
        assert "MASTER_ADDR=" in preview.text(config, plan(config))


ANSWERS = [
    "", "\n", "n1", "CLUSTER: other\n7|RUNNING", "JobState=PENDING Reason=Priority Partition=gpu Dependency=afterok:x", "|||",
    "7|", "%",
    "slurm_load_jobs error: Invalid job id", "PartitionTimeLimit|N/A", "(null)|2026-01-01", "UNLIMITED", "INVALID", "1-",
    "\x1b[31mred",
    "MaxTime=UNLIMITED", "MaxTime=", "NodeAddr=", "NodeAddr=;id", "ReqNodeNotAvail, n[1-2]|N/A", "é|é", "9" * 400,
]  # fmt: skip


def test_no_answer_of_slurm_ends_in_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = random.Random(0)

    def answer(*words: str, **_: object) -> str:
        if choose.random() < 0.2:
            raise slurm.SlurmError("Unable to contact slurm controller")
        return choose.choice(ANSWERS)

    monkeypatch.setattr(slurm, "call", answer)
    asked: list[Callable[[], object]] = [
        lambda: pending.reasons(
            [JobState("train", "7", "PENDING", None), JobState("preprocess", "8", "PENDING", None)]
        ),
        lambda: slurm.seconds_left("7"),
        lambda: slurm.show_job("7"),
        lambda: slurm.partition_limit("gpu"),
        lambda: rendezvous.master_address(["no-such-host.invalid"], None, lambda node: slurm.node_address(node)),
    ]
    for _ in range(SITES):
        for ask in asked[: 4 if choose.random() < 0.9 else 5]:
            try:
                ask()
            except slurm.SlurmError:
                continue
