"""launcher/submit/render.py: golden sbatch texts, equality with submitit's own text, and quoting of every value.

`pytest --update-golden` writes the golden files.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from submitit import SlurmExecutor

from conf import resolve
from conf.choices import Runtime
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
    executor = SlurmExecutor(render.job_folder(sample, planned), python=render.python_command(sample, planned))
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
        ({"cluster.train.sbatch": {"gres": "gpu:a100:8"}}, "gres=gpu:a100:8"),
        ({"cluster.train.sbatch": {"overcommit": "True"}}, "overcommit"),
        ({"cluster.train.sbatch": {"contiguous": ""}}, "contiguous"),
        ({"cluster.train.sbatch": {"exclusive": "user"}}, "exclusive=user"),
        ({"cluster.train.sbatch": {"-w": "n1"}}, "nodelist=n1"),
        ({"cluster.train.sbatch": {"GRES_FLAGS": "enforce-binding"}}, "gres-flags=enforce-binding"),
        ({"cluster.train.sbatch": {"ear-policy": "monitoring"}}, "ear-policy=monitoring"),
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
    ["cpus-per-task", "gpus-per-node", "mem", "account"],
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
        ({"cluster.train.sbatch": {"exclusive": "false"}}, "exclusive"),
        ({"cluster.train.sbatch": {"overcommit": "False"}}, "overcommit"),
        ({"cluster.train.sbatch": {"oversubscribe": "True"}}, "exclusive"),
        ({"cluster.train.sbatch": {"gres": "gpu:8"}}, "gpus-per-node"),
        ({"cluster.train.sbatch": {"tres-per-task": "gres/gpu:1"}}, "gpus-per-node"),
        ({"cluster.train.sbatch": {"gpus-per-task": "1"}}, "gpus-per-node"),
        ({"cluster.train.sbatch": {"-G": "32"}}, "gpus-per-node"),
        ({"cluster.train.sbatch": {"mem-per-cpu": "4G"}}, "mem"),
        ({"cluster.train.sbatch": {"cpus-per-gpu": "8"}}, "cpus-per-task"),
        ({"cluster.train.sbatch": {"cpus-per-task": None}}, "cpus-per-task"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_an_option_is_left_out(sample: Config, values: dict[str, object], option: str) -> None:
    assert option not in [line.split("=")[0] for line in directives(put(sample, values), "train")]


@pytest.mark.site(
    case="`sbatch: {dependency: singleton}`",
    before="replaced `afterok`; training began without data",
    after="both hold",
)
@pytest.mark.parametrize("user", ["singleton", "afterok:7:8,singleton"])
def test_the_users_dependency_is_added_to_those_of_the_job(sample: Config, user: str) -> None:
    put(sample, {"cluster.train.sbatch": {"dependency": user}, "cluster.cpu.sbatch": {"-d": user}})
    assert f"dependency=afterok:1000:1001,{user}" in [line.replace("'", "") for line in directives(sample, "train")]
    assert f"dependency={user}" in [line.replace("'", "") for line in directives(sample, "preprocess")]
    assert f'--dependency=afterok:"$train",{user} ' in render.chain_text(sample, plan(sample)).replace("'", "")


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
    variables = exported_variables(sample, {"HOME": "/home/me"})
    assert variables["LOADED"] == f"<gcc/12><{HOSTILE}>"
    assert variables["MUSTER_RUN"] == f"/runs/{HOSTILE}"
    assert variables["HF_HOME"] == HOSTILE.replace("$HOME", "/home/me")


@pytest.mark.site(
    case="`hf_home: $SCRATCH/hf`",
    before="a folder named `$SCRATCH`",
    after="expanded by the node; commands are never run",
)
@pytest.mark.parametrize(
    ("value", "expected"), [("$A/hf", "/x y/hf"), ("${A}b", "/x yb"), ("$(id)$A", "$(id)/x y"), ("$AB", "")]
)
def test_only_variables_are_expanded_in_paths(sample: Config, value: str, expected: str) -> None:
    assert exported_variables(put(sample, {"cluster.hf_home": value}), {"A": "/x y"})["HF_HOME"] == expected


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


def container_words(config: Config, environ: dict[str, str]) -> list[str]:
    """Return the words that bash gives to the container: those of apptainer, or those that pyxis adds to srun."""
    script = text(config, "train")
    [array] = re.findall(r"^muster_container=\((.*)\)$", script, re.MULTILINE) or [""]
    [command] = [line for line in script.splitlines() if line.startswith("srun ")]
    words = array or command[command.index(" bash ") :]
    done = subprocess.run(
        [tool("bash"), "-c", f"set -u; printf '%s\\0' {words}"], env=environ, capture_output=True, text=True, timeout=20
    )
    return done.stdout.split("\0")[:-1]


def test_srun_starts_the_pyxis_container(sample: Config) -> None:
    put(
        sample,
        {"cluster.container.image": "nvcr.io#nvidia/pytorch", "cluster.container.mounts": ["/data:/mnt/data:ro"]},
    )
    put(
        sample,
        {
            "cluster.python": "python3",
            "cluster.hf_home": "$SCRATCH/hf",
            "cluster.container.flags": ["--container-writable"],
        },
    )
    words = container_words(sample, {"SCRATCH": "/fast/`id` me"})
    assert words[0] == "--container-image=nvcr.io#nvidia/pytorch"
    mounts = set(words[1].removeprefix("--container-mounts=").split(","))
    own = {f"{path}:{path}" for path in ("/tmp", "/runs/.data", "/runs/golden", "/fast/`id` me/hf")}
    assert mounts == own | {"/data:/mnt/data:ro"}
    assert "--container-workdir=/runs/golden/code" in words
    assert {"MUSTER_RUN", "PYTHONPATH", "HF_HOME", "SCRATCH"} <= set(
        words[3].removeprefix("--container-env=").split(",")
    )
    assert words[-1] == "--container-writable"


@pytest.mark.parametrize(("gpus", "expected"), [(8, "gpus"), (0, "no-gpus")])
def test_apptainer_runs_the_python_of_every_rank(sample: Config, gpus: int, expected: str) -> None:
    put(sample, {"cluster.container.image": "/images/it's $X.sif", "cluster.python": "/usr/bin/python3.12"})
    put(sample, {"cluster.container.flags": ["--cleanenv"], "cluster.train.gpus_per_node": gpus})
    words = container_words(sample, {"X": "7"})
    assert words[:3] == ["bash", "/runs/golden/code/slurm_templates/container.sh", "auto"]
    assert words[4] == expected
    binds = {words[index + 1] for index, word in enumerate(words) if word == "--bind"}
    assert binds == {f"{path}:{path}" for path in ("/tmp", "/runs/.data", "/runs/golden")}
    assert words[words.index("--cleanenv") :][:4] == ["--cleanenv", "/images/it's 7.sif", "/usr/bin/python3.12", "-u"]


@pytest.mark.parametrize("flag", ["--nv", "--nvccli", "--rocm"])
def test_the_users_flag_for_gpus_is_the_only_one(sample: Config, flag: str) -> None:
    put(sample, {"cluster.container.image": "/a.sif", "cluster.container.flags": [flag]})
    assert container_words(sample, {})[4] == "no-gpus"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"cluster.container.runtime": Runtime.singularity}, "singularity"),
        ({"cluster.container.program": "/opt/apptainer 2/bin/apptainer"}, "/opt/apptainer 2/bin/apptainer"),
    ],
    ids=["singularity", "a program"],
)
def test_the_program_of_a_container_can_be_chosen(sample: Config, values: dict[str, object], expected: str) -> None:
    put(sample, {"cluster.container.image": "/a.sif"} | values)
    assert container_words(sample, {})[2] == expected


@pytest.mark.parametrize("image", ["/a.sif", "/a.sqsh"])
def test_the_nodes_own_python_runs_attempt_outside_the_container(sample: Config, image: str) -> None:
    put(sample, {"cluster.container.image": image, "cluster.python": "/only/inside/python"})
    outside = [line for line in text(sample, "train").splitlines() if "launcher.supervise.attempt" in line]
    assert len(outside) == 2
    assert all("python3 -m launcher.supervise.attempt" in line and "/only/inside" not in line for line in outside)


def test_arguments_of_srun_come_last(sample: Config) -> None:
    words = srun_words(put(sample, {"cluster.srun_args": ["--mpi=none", HOSTILE]}))
    assert words[words.index("--wait=60") + 1 :][:2] == ["--mpi=none", HOSTILE]


def test_every_rendered_script_passes_shellcheck(compose: Compose, tmp_path: Path) -> None:
    words: dict[str, tuple[str, ...]] = {name: (*CASES[name], *PATHS) for name in CASES}
    words["odd"] = (
        *words["llama8b_fsdp"],
        "cluster.modules=[gcc]",
        "cluster.container.image=a.sqsh",
        "cluster.hf_home=$A/b c",
    )
    words["sif"] = (*words["llama8b_fsdp"], "cluster.container.image=$A/a.sif")
    for name, given in words.items():
        config = put(compose(*given), {"run_dir": '/runs/it\'s "ü" & more'} if name == "odd" else {})
        put(config, {"cluster.train.sbatch": {"dependency": "singleton"}} if name == "sif" else {})
        (tmp_path / f"{name}.submit.sh").write_text(render.chain_text(config, plan(config)))
        for job in plan(config):
            (tmp_path / f"{name}.{job.name}.sbatch").write_text(text(config, job.name))
            script = render.script_text(config, job, Path(config.run_dir) / "config.yaml")
            (tmp_path / f"{name}.{job.name}.by_hand.sbatch").write_text(script)
    checked = subprocess.run(
        [tool("shellcheck"), "--shell=bash", *sorted(tmp_path.iterdir()), render.TEMPLATES / "container.sh"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (checked.stdout, checked.returncode) == ("", 0)
