"""launcher/submit/render.py: golden sbatch texts, equality with submitit's own text, and quoting of every value.

`pytest --update-golden` writes the golden files.
"""

import shlex
import subprocess
from pathlib import Path

import pytest
from submitit import SlurmExecutor

from conf import resolve
from conf.choices import Container
from conf.schema import Config
from launcher.environment import job_variables
from launcher.plan import Job, plan
from launcher.submit import render
from tests.conftest import ROOT, Compose, Programs, put, tool

GOLDEN = ROOT / "tests/golden"
PATHS = ("cluster.python=/opt/muster/bin/python", "data.path=/data/rows.jsonl", "generate.prompts=/data/prompts.jsonl")
CASES = {
    "llama70b_zero3": ("experiment=llama70b_zero3", "pipeline=checked"),
    "llama8b_fsdp": ("experiment=llama8b_fsdp", "pipeline=train"),
    "llama8b_lora": ("experiment=llama8b_lora", "pipeline=train"),
}
RENDERED = [
    ("llama70b_zero3", "preflight"),
    ("llama70b_zero3", "preprocess"),
    ("llama70b_zero3", "train"),
    ("llama70b_zero3", "consolidate"),
    ("llama70b_zero3", "evaluate"),
    ("llama70b_zero3", "generate"),
    ("llama8b_fsdp", "train"),
    ("llama8b_lora", "train"),
]
HOSTILE = """it's "$HOME" `id` $(id) \\ ;&|*?<>(){}[]!#~ ü"""
"""A value with every character that is special to a shell."""


@pytest.fixture
def sample(compose: Compose) -> Config:
    """A config with every job. Tests may change it."""
    return compose("experiment=llama8b_fsdp", "pipeline=checked", *PATHS)


def job_of(config: Config, name: str) -> Job:
    return next(job for job in plan(config) if job.name == name)


def text(config: Config, name: str) -> str:
    job = job_of(config, name)
    return render.sbatch_text(config, job, [str(1000 + number) for number, _ in enumerate(job.after)])


def compare(name: str, rendered: str, config: Config, update: bool) -> None:
    # Every new config key changes the digest, so the golden files have a constant instead.
    rendered = rendered.replace(resolve.digest(config), "0123456789abcdef") + "\n"
    if update:
        (GOLDEN / name).write_text(rendered)
    assert rendered == (GOLDEN / name).read_text(), f"tests/golden/{name} differs: see pytest --update-golden"


@pytest.mark.parametrize(("case", "job"), RENDERED, ids=[".".join(item) for item in RENDERED])
def test_the_sbatch_text_equals_the_golden_file(
    compose: Compose, pytestconfig: pytest.Config, case: str, job: str
) -> None:
    config = compose(*CASES[case], *PATHS)
    compare(f"{case}.{job}.sbatch", text(config, job), config, pytestconfig.getoption("--update-golden"))


def test_the_script_by_hand_equals_the_golden_file(compose: Compose, pytestconfig: pytest.Config) -> None:
    config = compose(*CASES["llama70b_zero3"], *PATHS)
    script = render.script_text(config, job_of(config, "train"), Path(config.run_dir) / "config.yaml")
    compare("by_hand.train.sbatch", script, config, pytestconfig.getoption("--update-golden"))


def test_every_golden_file_belongs_to_a_test() -> None:
    expected = {f"{case}.{job}.sbatch" for case, job in RENDERED} | {"by_hand.train.sbatch"}
    assert {path.name for path in GOLDEN.iterdir()} == expected


@pytest.mark.parametrize("job", ["preflight", "preprocess", "train", "consolidate", "evaluate", "generate"])
def test_the_text_equals_submitits_own(sample: Config, programs: Programs, job: str) -> None:
    programs(srun="exit 1")  # submitit checks that srun exists
    planned = job_of(sample, job)
    executor = SlurmExecutor(render.job_folder(sample, planned), python=render.python_command(sample))
    executor.update_parameters(**render.parameters(sample, planned, ["7"]))
    written = executor._make_submission_file_text(executor._submitit_command_str, "any")
    assert render.sbatch_text(sample, planned, ["7"]) == written


def directives(config: Config, job: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text(config, job).splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("preprocess", []),
        ("train", ["dependency=afterok:1000:1001"]),
        ("consolidate", ["dependency=afterok:1000"]),
        ("evaluate", ["dependency=afterok:1000:1001"]),
    ],
)
def test_a_job_starts_after_its_inputs_completed(sample: Config, job: str, expected: list[str]) -> None:
    assert [line for line in directives(sample, job) if line.startswith("dependency")] == expected
    assert "kill-on-invalid-dep=yes" in directives(sample, job)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"cluster.account": "proj42"}, "account=proj42"),
        ({"cluster.train.partition": "gpu"}, "partition=gpu"),
        ({"cluster.train.qos": "long"}, "qos=long"),
        ({"cluster.train.constraint": "a100|h100"}, "constraint='a100|h100'"),
        ({"cluster.train.exclude": "n[1-2]"}, "exclude='n[1-2]'"),
        ({"cluster.train.time_min": 90}, "time=90"),
        ({"cluster.train.memory_gib": 512}, "mem=512G"),
        ({"cluster.train.memory_gib": 0}, "mem=0"),
        ({"cluster.train.gpu_type": "a100"}, "gpus-per-node=a100:8"),
        ({"cluster.train.exclusive": True}, "exclusive"),
        ({"cluster.signal_s": 300}, "signal=USR2@300"),
        ({"cluster.train.sbatch": {"reservation": "night shift"}}, "reservation='night shift'"),
        ({"cluster.train.sbatch": {"gpus-per-node": None, "gres": "gpu:8"}}, "gres=gpu:8"),
        ({"cluster.train.sbatch": {"time": "2-0"}}, "time=2-0"),
        ({"cluster.train.sbatch": {"mem": "500G"}}, "mem=500G"),
        ({"name": "it's"}, """job-name='it'"'"'s/train'"""),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_sbatch_gets_an_option_once(sample: Config, values: dict[str, object], expected: str) -> None:
    options = directives(put(sample, values), "train")
    assert expected in options
    assert [line.split("=")[0] for line in options].count(expected.split("=")[0]) == 1


@pytest.mark.parametrize(
    "option",
    ["cpus-per-task", "gpus-per-node", "ntasks-per-node", "job-name"],
)
def test_an_option_of_two_words_can_be_overridden(sample: Config, option: str) -> None:
    options = directives(put(sample, {"cluster.train.sbatch": {option: "7"}}), "train")
    assert [line for line in options if line.startswith(option)] == [f"{option}=7"]


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({}, "wckey"),
        ({}, "partition"),
        ({}, "account"),
        ({"cluster.train.gpus_per_node": 0}, "gpus-per-node"),
        ({"cluster.train.memory_gib": None}, "mem"),
        ({"cluster.train.exclusive": False}, "exclusive"),
        ({"cluster.train.sbatch": {"gpus-per-node": None}}, "gpus-per-node"),
        ({"cluster.train.sbatch": {"requeue": None}}, "requeue"),
        ({"cluster.train.sbatch": {"cpus-per-task": None}}, "cpus-per-task"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_an_option_is_left_out(sample: Config, values: dict[str, object], option: str) -> None:
    assert option not in [line.split("=")[0] for line in directives(put(sample, values), "train")]


def exported_variables(config: Config, environ: dict[str, str]) -> dict[str, str]:
    """Return the variables after bash has run the setup of a job up to its attempt. LOADED: the arguments of `module load`."""
    lines = render.parameters(config, job_of(config, "train"))["setup"]
    end = next(number for number, line in enumerate(lines) if line.startswith("# Open the next attempt"))
    script = ['module() { export LOADED="${LOADED-}<$2>"; }', *lines[:end], f"exec {tool('env')} -0"]
    command = [tool("bash"), "-c", "\n".join(script)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=20)
    return dict(item.split("=", 1) for item in done.stdout.rstrip("\0").split("\0"))


@pytest.mark.parametrize("value", [HOSTILE, "", "two\nlines", "  spaces  ", "-n", "a=b"])
def test_values_reach_the_job_unchanged(sample: Config, value: str) -> None:
    variables = exported_variables(put(sample, {"cluster.environment": {"MINE": value}}), {})
    assert variables["MINE"] == value


def test_module_names_and_folders_reach_the_job_unchanged(sample: Config) -> None:
    put(sample, {"cluster.modules": ["gcc/12", HOSTILE], "run_dir": f"/runs/{HOSTILE}", "cluster.hf_home": HOSTILE})
    variables = exported_variables(sample, {})
    assert variables["LOADED"] == f"<gcc/12><{HOSTILE}>"
    assert variables["MUSTER_RUN"] == f"/runs/{HOSTILE}"
    assert variables["HF_HOME"] == HOSTILE


@pytest.mark.parametrize("given", ["", "/mine:/our code"])
def test_the_runs_code_comes_before_the_users_python_path(sample: Config, given: str) -> None:
    variables = exported_variables(put(sample, {"run_dir": f"/runs/{HOSTILE}"}), {"PYTHONPATH": given} if given else {})
    assert variables["PYTHONPATH"] == f"/runs/{HOSTILE}/code" + (f":{given}" if given else "")


def test_every_variable_of_the_preview_is_in_the_script(sample: Config) -> None:
    shown = job_variables(sample, job_of(sample, "train"))
    assert shown.items() <= exported_variables(sample, {}).items()


def test_setup_lines_run_unchanged_after_the_modules(sample: Config) -> None:
    put(sample, {"cluster.modules": ["gcc"], "cluster.setup": ['export MINE="$LOADED and $HOME"']})
    assert exported_variables(sample, {"HOME": "/home/me"})["MINE"] == "<gcc> and /home/me"


def srun_words(config: Config) -> list[str]:
    [line] = [line for line in text(config, "train").splitlines() if line.startswith("srun ")]
    return shlex.split(line)


def test_srun_starts_the_pyxis_container(sample: Config) -> None:
    mounts = [HOSTILE, "/data:/mnt/data"]
    put(sample, {"cluster.container": Container.pyxis, "cluster.container_image": "nvcr.io#nvidia/pytorch"})
    put(sample, {"cluster.container_mounts": mounts, "cluster.python": "python3"})
    words = srun_words(sample)
    assert "--container-image=nvcr.io#nvidia/pytorch" in words
    assert f"--container-mounts=/runs/golden:/runs/golden,{HOSTILE}:{HOSTILE},/data:/mnt/data" in words
    assert "--container-workdir=/runs/golden/code" in words


def test_apptainer_runs_the_python_of_every_rank(sample: Config) -> None:
    put(sample, {"cluster.container": Container.apptainer, "cluster.container_image": "/images/it's.sif"})
    put(sample, {"cluster.container_mounts": [HOSTILE], "cluster.python": "/usr/bin/python3.12"})
    words = srun_words(sample)
    start = words.index("apptainer")
    assert words[start : start + 8] == [
        *("apptainer", "exec", "--nv", "--bind", f"/runs/golden,{HOSTILE}"),
        *("/images/it's.sif", "/usr/bin/python3.12", "-u"),
    ]


@pytest.mark.parametrize("container", ["apptainer", "pyxis"])
def test_the_nodes_own_python_runs_attempt_outside_the_container(sample: Config, container: str) -> None:
    put(sample, {"cluster.container": Container[container], "cluster.container_image": "image"})
    put(sample, {"cluster.python": "/only/inside/python"})
    outside = [line for line in text(sample, "train").splitlines() if "launcher.supervise.attempt" in line]
    assert len(outside) == 2
    assert all("python3 -m launcher.supervise.attempt" in line and "/only/inside" not in line for line in outside)


def test_arguments_of_srun_come_last(sample: Config) -> None:
    words = srun_words(put(sample, {"cluster.srun_args": ["--mpi=none", HOSTILE]}))
    assert words[words.index("--wait=60") + 1 :][:2] == ["--mpi=none", HOSTILE]


def test_every_rendered_script_passes_shellcheck(compose: Compose, tmp_path: Path) -> None:
    words: dict[str, tuple[str, ...]] = {name: (*CASES[name], *PATHS) for name in CASES}
    words["odd"] = (*words["llama8b_fsdp"], "cluster.modules=[gcc]", "cluster.container=pyxis")
    for name, given in words.items():
        config = put(compose(*given), {"run_dir": '/runs/it\'s "ü" & more'} if name == "odd" else {})
        (tmp_path / f"{name}.submit.sh").write_text(render.chain_text(config, plan(config)))
        for job in plan(config):
            (tmp_path / f"{name}.{job.name}.sbatch").write_text(text(config, job.name))
            script = render.script_text(config, job, Path(config.run_dir) / "config.yaml")
            (tmp_path / f"{name}.{job.name}.by_hand.sbatch").write_text(script)
    checked = subprocess.run(
        [tool("shellcheck"), "--shell=bash", *sorted(tmp_path.iterdir())], capture_output=True, text=True, timeout=60
    )
    assert (checked.stdout, checked.returncode) == ("", 0)
