"""What may import what: the layers of the code, no import circle, no torch on the login node, bare Python outside containers."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "peft", "datasets", "numpy", "bitsandbytes", "triton"}
BARE = (
    "conf.files",
    "launcher.supervise.attempt",
    "launcher.supervise.rendezvous",
    "launcher.supervise.best_run",
    "launcher.slurm",
)
"""These run on the node's own Python, outside the container."""

JOBS_FOLDERS = (
    "jobs.distributed",
    "jobs.tokenization",
    "jobs.data",
    "jobs.tensor_io",
    "jobs.model",
    "jobs.training",
    "jobs.report",
    "jobs.monitoring",
    "jobs.backends",
    "jobs.checkpoint",
    "jobs.evaluation",
    "jobs.consolidation",
    "jobs.programs",
    "jobs",
)
"""A folder of jobs imports only folders that stand before it; the jobs themselves import all of them."""

LAUNCHER_FOLDERS = (
    "launcher",
    "launcher.estimate",
    "launcher.run_folder",
    "launcher.supervise",
    "launcher.status",
    "launcher.convert",
    "launcher.check",
    "launcher.submit",
    "launcher.doctor",
    "launcher.commands",
    "launcher.__main__",
)
"""Likewise for the launcher: its own files (plan, environment, slurm, ...) come first, its commands last."""

PURE = (
    "conf.jobs",
    "launcher.plan",
    "launcher.check.rules",
    "launcher.check.combinations",
    "launcher.check.data_rules",
    "launcher.check.deepspeed_rules",
    "launcher.check.packing_rules",
    "launcher.check.parallel_rules",
    "launcher.check.program_rules",
    "launcher.check.command_line",
    "launcher.check.sweep_rules",
    "launcher.check.synonyms",
    "launcher.submit.render",
    "launcher.submit.preview",
    "launcher.submit.sweep_scripts",
    "launcher.supervise.error_classes",
    "launcher.supervise.hang_diagnosis",
    "launcher.supervise.start_failures",
)
"""Modules that decide and do nothing, besides those of launcher.estimate."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    module_name(path): path for part in ("conf", "pages", "launcher", "jobs") for path in (ROOT / part).rglob("*.py")
}
ESTIMATE = sorted(name for name in FILES if name.startswith("launcher.estimate."))


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in FILES} or {node.module}
    return frozenset(found)


def folder_of(name: str) -> str:
    """The folder that a module lies in; the launcher's commands count as one of their own."""
    if name == "launcher.__main__":
        return name
    return name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]


def assert_no_circle(graph: Mapping[str, Iterable[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


def loaded(program: str, *words: str, flags: tuple[str, ...] = ()) -> set[str]:
    """Top-level modules that are loaded once `program` has run with `words` as its arguments."""
    code = f"{program}\nimport sys\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, *flags, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED ")[2].split())


def test_no_files_import_each_other() -> None:
    assert_no_circle({name: {item for item in imports(path) if item in FILES} for name, path in FILES.items()})


@pytest.mark.parametrize("order", [JOBS_FOLDERS, LAUNCHER_FOLDERS], ids=["jobs", "launcher"])
def test_folders_import_only_those_before_them(order: tuple[str, ...]) -> None:
    top = order[0].split(".")[0]
    wrong = defaultdict(set)
    for name, path in FILES.items():
        if name.split(".")[0] != top:
            continue
        for item in imports(path):
            if (
                item in FILES
                and item.split(".")[0] == top
                and order.index(folder_of(item)) > order.index(folder_of(name))
            ):
                wrong[name].add(item)
    assert not wrong


def test_the_launcher_never_imports_torch() -> None:
    program = "import launch\nassert launch.main() == 0"
    found = loaded(program, "cluster=slurm", "model=llama70b", "parallel=zero3", "dry_run=true")
    assert {"hydra", "submitit", "launcher"} <= found
    assert not found & HEAVY


def test_no_module_of_the_launcher_imports_torch() -> None:
    names = [name for name in FILES if name.startswith("launcher.") and not name.endswith("__main__")]
    assert not loaded("\n".join(f"import {name}" for name in names)) & HEAVY


def test_merging_a_foreign_checkpoint_needs_no_torch() -> None:
    """Importing it takes longer than a small merge."""
    assert not loaded("import jobs.consolidate, jobs.consolidation.external") & HEAVY - {"numpy"}


def test_weights_are_read_ahead_before_torch_is_imported() -> None:
    assert not loaded("import jobs.tensor_io.prefetch") & HEAVY - {"numpy"}


@pytest.mark.parametrize("name", BARE)
def test_what_runs_outside_a_container_needs_only_python(name: str) -> None:
    found = loaded(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {name}", flags=("-S", "-I"))
    assert name.split(".")[0] in found
    assert found - {"conf", "launcher", "__main__", "sys"} <= set(sys.stdlib_module_names)


def test_jobs_know_nothing_of_the_launcher() -> None:
    for name, path in FILES.items():
        if name.split(".")[0] == "jobs":
            used = {item.split(".")[0] for item in imports(path)}
            assert not used & {"launcher", "launch", "hydra", "submitit"}, name


def test_conf_imports_only_omegaconf() -> None:
    for name, path in FILES.items():
        if name.split(".")[0] == "conf":
            used = {item.split(".")[0] for item in imports(path)}
            assert used <= sys.stdlib_module_names | {"conf", "omegaconf"}, name


def test_pages_import_only_conf_and_jinja2() -> None:
    """Launcher and jobs both use them."""
    for name, path in FILES.items():
        if name.split(".")[0] == "pages":
            used = {item.split(".")[0] for item in imports(path)}
            assert used <= sys.stdlib_module_names | {"conf", "pages", "jinja2", "markupsafe"}, name


@pytest.mark.parametrize("name", [*PURE, *ESTIMATE])
def test_a_pure_module_neither_runs_programs_nor_reads_the_environment(name: str) -> None:
    assert not imports(FILES[name]) & {"os", "subprocess", "socket", "shutil", "tempfile"}


@pytest.mark.parametrize("name", ESTIMATE)
def test_an_estimate_reads_nothing_but_the_config(name: str) -> None:
    of_python = {item for item in imports(FILES[name]) if item.split(".")[0] not in ("conf", "launcher")}
    assert of_python <= {"collections.abc", "copy", "dataclasses", "enum", "re", "typing"}
    assert imports(FILES[name]) - of_python <= {
        "conf.batch",
        "conf.bytes_per_weight",
        "conf.choices",
        "conf.deepspeed",
        "conf.mesh",
        "conf.schema",
        "conf.schema_model",
        "conf.schema_training",
        "launcher.estimate",
        *ESTIMATE,
    }


def test_only_the_worker_starts_a_job() -> None:
    users = {name for name, path in FILES.items() if name.startswith("launcher.") and "jobs" in imports(path)}
    assert users == {"launcher.supervise.worker"}


def test_only_a_few_modules_of_the_launcher_run_programs() -> None:
    users = {name for name in FILES if name.startswith("launcher.") and "subprocess" in imports(FILES[name])}
    assert users == {
        "launcher.doctor.training",  # the Python of the jobs
        "launcher.slurm_command",
        "launcher.sync",  # the commands of trackers
        "launcher.version",  # git
        "launcher.check.local_gpus",  # nvidia-smi
        "launcher.submit.local_executor",  # submitit's controller
    }


def test_the_folders_of_tests_mirror_those_of_the_code() -> None:
    code = {str(path.parent.relative_to(ROOT)) for path in FILES.values()}
    tests = {str(path.parent.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}
    assert tests - {".", "slurm"} <= code


def test_a_long_module_says_why() -> None:
    for path in [*FILES.values(), ROOT / "launch.py"]:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 300:
            docstring = ast.get_docstring(ast.parse(text)) or ""
            assert "Long because" in docstring, (
                f"{path}: over 300 lines; split it, or say 'Long because ...' at its top"
            )
