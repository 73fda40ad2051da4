"""launcher/check/program_rules.py: commands that are refused, and that each remedy is accepted."""

import pytest

from conf.choices import ProgramLauncher
from launcher.check import program_rules
from tests.conftest import Compose


@pytest.mark.parametrize(
    ("words", "command", "part"),
    [
        ([], None, "names no program"),
        (["jobs=[preprocess,train]"], "python a.py", "takes the place of preprocess, train. Use pipeline=custom"),
        ([], "python 'a.py", "Close the quotes"),
        ([], "cd x && python a.py", "Put these commands into a script: bash train.sh"),
        ([], "A=1 python a.py", "Set the variable with +cluster.environment.A=1"),
        ([], "torchrun a.py", "choose custom.launcher=torchrun"),
        ([], "/x/bin/accelerate launch a.py", "choose custom.launcher=accelerate"),
        (["custom.launcher=accelerate"], "bash a.sh", "Use custom.launcher=srun"),
        (["custom.launcher=accelerate"], "--config_file a.yaml a.py", "your own file with parallel=ddp"),
        (["custom.launcher=accelerate"], "--mixed-precision=fp16 -m a", "your own file with parallel=ddp"),
        (["custom.launcher=torchrun"], "bash a.sh", "Use custom.launcher=srun"),
        ([], "", "names no program"),
        ([], "ray start --head", "choose custom.launcher=ray"),
        (["custom.launcher=ray"], "bash a.sh", "Use custom.launcher=srun"),
    ],
)
def test_a_command_that_cannot_work_is_refused(
    compose: Compose, words: list[str], command: str | None, part: str
) -> None:
    config = compose("cluster=slurm", "pipeline=custom", *words)
    config.custom.command = command
    assert [part in str(problem) for problem in program_rules.problems(config)] == [True]


@pytest.mark.parametrize(("name", "value"), [("cpus-per-task", "4"), ("gpus-per-task", "1"), ("c", "4")])
def test_what_sbatch_counts_per_task_is_refused_where_a_task_is_a_node(compose: Compose, name: str, value: str) -> None:
    config = compose("cluster=slurm", "pipeline=custom", "custom.launcher=torchrun")
    config.custom.command, config.cluster.train.sbatch = "a.py", {name: value}
    assert ["has one task on each node" in str(problem) for problem in program_rules.problems(config)] == [True]
    config.custom.launcher = ProgramLauncher.srun
    config.custom.command = "python a.py"
    assert not list(program_rules.problems(config))


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["custom.launcher=srun"], "bash train.sh"),
        (["custom.launcher=srun"], "python a.py"),
        (["custom.launcher=torchrun"], "a.py"),
        (["custom.launcher=torchrun"], "python -m a.b --x y"),
        (["custom.launcher=torchrun", "parallel=zero3", "cluster.train.gpus_per_node=0"], "a.py"),
        (["custom.launcher=ray"], "a.py"),
        (["custom.launcher=accelerate"], "a.py --mixed_precision bf16"),
        (["custom.launcher=accelerate"], "--dynamo_backend=inductor -m a"),
        (["custom.launcher=accelerate", "parallel=ddp"], "--config_file a.yaml a.py"),
    ],
)
def test_a_command_that_works_is_accepted(compose: Compose, words: list[str], command: str) -> None:
    config = compose("cluster=slurm", "pipeline=custom", *words)
    config.custom.command = command
    assert not list(program_rules.problems(config))
