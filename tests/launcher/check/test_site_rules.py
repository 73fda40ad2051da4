"""launcher/check/site_rules.py and launcher/sbatch_options.py: values of a cluster file that work, or are refused with a remedy."""

import shutil
import subprocess
from pathlib import Path

import pytest

from conf.schema import Config
from launcher import sbatch_options
from launcher.check import site_rules
from tests.conftest import Compose, put

TRAIN = "cluster.train.sbatch"


@pytest.fixture
def config(compose: Compose) -> Config:
    return compose("cluster=slurm", "model=llama8b", "pipeline=train")


def messages(config: Config) -> list[str]:
    return [str(problem) for problem in site_rules.problems(config)]


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("array", "0-3", "For several runs add -m"),
        ("-a", "0-3", "For several runs add -m"),
        ("nodes", "2", "cluster.train.nodes=..."),
        ("-N", "2", "cluster.train.nodes=..."),
        ("NTASKS", "2", "cluster.train.ranks_per_node=..."),
        ("ntasks_per_node", "2", "cluster.train.ranks_per_node=..."),
        ("tasks-per-node", "2", "cluster.train.ranks_per_node=..."),
        ("ntasks-per-node", None, "cluster.train.ranks_per_node=..."),
        ("ntasks-per-gpu", "1", "cluster.train.ranks_per_node=..."),
        ("outp", "/x", "run_dir=..."),
        ("--error", "/x", "run_dir=..."),
        ("chdir", "/x", "run_dir=..."),
        ("wrap", "id", "cluster.setup"),
        ("job-name", "x", "name=..."),
        ("J", "x", "name=..."),
        ("time", "2:00:00", "cluster.train.time_min=120"),
        ("t", "1-12", "cluster.train.time_min=2160"),
        ("signal", "B:USR1@60", "cluster.signal_s=..."),
        ("requeue", "True", "cluster.requeue=true"),
        ("no-requeue", "True", "cluster.requeue=false"),
        ("parsable", "True", "would not be found"),
        ("quiet", "True", "would not be found"),
        ("wait", "True", "muster status RUN"),
        ("test-only", "True", "dry_run=true"),
        ("M", "other", "export SLURM_CLUSTERS=NAME"),
        ("overcommit", "2", "Write true to set it"),
        ("gres", "True", "needs a value"),
        ("comment", "True", "put it into quotes"),
        ("dependency", "afterok:1?afterok:2", "use commas"),
        ("dependency", "afterok:x", "afterok:123:124"),
        ("begin", "960", "put it into quotes"),
        ("cpus-per-task", "many", "cluster.train.cpus_per_rank=..."),
        ("gres", "gpu:a100:4", "cluster.train.gpus_per_node=8 with one rank for each GPU"),
        ("gpus-per-task", "2", "or write 1 here"),
        ("gpus", "8", "or write 32 here"),
        ("tres-per-task", "gres/gpu:2", "or write 1 here"),
        ("comment\n#SBATCH --wrap", "x", "is not the name of an option"),
    ],
)
@pytest.mark.site(
    case="options of Muster's own in `sbatch:` (array, nodes, output, wait, ...)",
    before="a wrong or lost job",
    after="refused",
)
def test_an_option_that_cannot_work_is_refused(config: Config, option: str, value: str | None, remedy: str) -> None:
    found = messages(put(config, {TRAIN: {option: value}}))
    assert any(remedy in message and "sbatch" in message for message in found), found


@pytest.mark.parametrize(
    "options",
    [
        {"overcommit": "True", "spread-job": "", "contiguous": "false", "no-kill": "True", "exclusive": "user"},
        {"dependency": "afterok:12:13,singleton,after:7+5"},
        {"gres": "gpu:a100:8,shard:2", "hint": "nomultithread", "comment": "my run", "mem-per-cpu": "500M"},
        {"distribution": "block:block", "threads-per-core": "1", "mail-type": "FAIL,TIME_LIMIT_80", "nice": "100"},
        {
            "reservation": "night",
            "licenses": "matlab:1",
            "switches": "1@60",
            "begin": "now+1hour",
            "nodelist": "n[1-2]",
        },
        {
            "kill-on-invalid-dep": "True",
            "gpus-per-node": None,
            "requeue": None,
            "gpus-per-task": "h100:1",
            "cpus-per-gpu": "8",
        },
        {"a-plugin-of-the-site": "7", "cpus-per-task": None, "wckey": "w", "account": "other", "time-min": "2:00:00"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.site(
    case="`sbatch: {overcommit: true}`", before="sbatch refused `--overcommit=True`", after="a flag without a value"
)
def test_what_centres_ask_for_is_accepted(config: Config, options: dict[str, str | None]) -> None:
    assert messages(put(config, {TRAIN: options})) == []


@pytest.mark.parametrize(
    ("values", "key", "remedy"),
    [
        ({"cluster.environment": {"é": "1"}}, "cluster.environment.é", "letters, digits and _"),
        ({"cluster.environment": {"IFS": "x"}}, "cluster.environment.IFS", "in your program"),
        ({"cluster.environment": {"UID": "0"}}, "cluster.environment.UID", "in your program"),
        ({"cluster.environment": {"RANK": "0"}}, "cluster.environment.RANK", "Remove it"),
        ({"cluster.environment": {"SLURM_JOB_ID": "0"}}, "cluster.environment.SLURM_JOB_ID", "Remove it"),
        ({"cluster.environment": {"MUSTER_ATTEMPT": "7"}}, "cluster.environment.MUSTER_ATTEMPT", "Remove it"),
        (
            {"cluster.environment": {"MASTER_PORT": "x"}},
            "cluster.environment.MASTER_PORT",
            "cluster.network.master_port",
        ),
        ({"cluster.srun_args": ["none"]}, "cluster.srun_args", "--option=value"),
        ({"cluster.srun_args": ["--output=x"]}, "cluster.srun_args", "run_dir=..."),
        ({"cluster.srun_args": ["-n4"]}, "cluster.srun_args", "ranks_per_node"),
        ({"cluster.network.master_suffix": "i; id"}, "cluster.network.master_suffix", "letters, digits"),
        ({"cluster.network.master_address": "$(id)"}, "cluster.network.master_address", "ib-{host}"),
        (
            {"cluster.network.master_suffix": "i", "cluster.network.master_address": "x"},
            "cluster.network.master_suffix",
            "one of",
        ),
        ({"cluster.scratch": "$(id)"}, "cluster.scratch", "commands are not run"),
        ({"cluster.hf_home": "`id`"}, "cluster.hf_home", "commands are not run"),
        ({"cluster.hf_home": "hf"}, "cluster.hf_home", "/ at its start"),
        ({"data.cache": "${A:-$(id)}"}, "data.cache", "commands are not run"),
        (
            {"cluster.container.image": "a.sqsh", "cluster.container.program": "/x"},
            "cluster.container.program",
            "Remove it",
        ),
        (
            {"cluster.container.image": "a.sif", "cluster.container.flags": ["x"]},
            "cluster.container.flags",
            "--option=value",
        ),
        (
            {"cluster.container.image": "a.sif", "cluster.container.mounts": ["/a,/b"]},
            "cluster.container.mounts",
            "one entry",
        ),
        (
            {"cluster.container.image": "a.sif", "cluster.container.mounts": ["/a:b"]},
            "cluster.container.mounts",
            "/path:/inside",
        ),
        ({"cluster.container.image": "a.sif", "run_dir": "/runs/a:b"}, "run_dir", "Choose another path"),
        ({"cluster.container.image": "a.sqsh", "jobs": ["push"]}, "cluster.container.runtime", "Use hub.where=job"),
        (
            {"cluster.container.image": "a.sif", "cluster.scratch": "/x/$SLURM_JOB_ID", "jobs": ["push"]},
            "cluster.scratch",
            "Use hub.where=job",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_value_that_would_be_misread_is_refused(
    config: Config, values: dict[str, object], key: str, remedy: str
) -> None:
    found = messages(put(config, values))
    assert any(message.startswith(key) and remedy in message for message in found), found


def test_times_in_all_forms_of_slurm_become_minutes() -> None:
    texts = ("90", "90:00", "0:30", "2:00:00", "2:00:01", "1-0", "1-12", "1-12:30", "1-12:30:00", "soon")
    expected = [90, 90, 1, 120, 121, 1440, 2160, 2190, 2190, None]
    assert [sbatch_options.minutes(text) for text in texts] == expected


def test_the_table_of_options_is_that_of_sbatch(tmp_path: Path) -> None:
    if not (sbatch := shutil.which("sbatch")):
        pytest.skip("no sbatch")
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=a Nodes=n1\n")
    text = subprocess.run([sbatch, "--help"], env={"SLURM_CONF": str(conf)}, capture_output=True, text=True).stdout
    lines = [line.split() for line in text.splitlines() if line.startswith("  -") or line.startswith("      --")]
    shown = {words[0] if words[0].startswith("--") else words[1]: words[0].strip(",") for words in lines}
    assert len(shown) > 60
    for long, short in shown.items():
        name = long.removeprefix("--").split("=")[0].split("[")[0]
        assert name in sbatch_options.KNOWN, long
        assert ("[=" in long) <= (name in sbatch_options.FLAGS_WITH_VALUE | {"export", "wrap", "signal"}), long
        assert not short.startswith("-") or short.startswith("--") or sbatch_options.long_name(short) == name, short
