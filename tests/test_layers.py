"""What may import what: no torch on the login node, nothing of the launcher in a job, bare Python outside containers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "peft", "datasets", "numpy", "bitsandbytes", "triton"}
LAUNCHER = sorted(f"launcher.{path.stem}" for path in (ROOT / "launcher").glob("*.py") if path.stem != "__init__")
BARE = ("conf.files", "launcher.supervise.attempt", "launcher.supervise.rendezvous", "launcher.slurm")
"""These run on the node's own Python, outside the container."""


def loaded(program: str, *words: str, flags: tuple[str, ...] = ()) -> set[str]:
    """Top-level modules that are loaded once `program` has run with `words` as its arguments."""
    code = f"{program}\nimport sys\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, *flags, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED ")[2].split())


def test_the_launcher_never_imports_torch() -> None:
    program = "import launch\nassert launch.main() == 0"
    found = loaded(program, "cluster=slurm", "model=llama70b", "parallel=zero3", "dry_run=true")
    assert {"hydra", "submitit", "launcher"} <= found
    assert not found & HEAVY


@pytest.mark.parametrize("name", LAUNCHER)
def test_no_module_of_the_launcher_imports_torch(name: str) -> None:
    found = loaded(f"import {name}")
    assert "launcher" in found
    assert not found & HEAVY


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


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, with the package of a relative one spelled out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("jobs"), ids=name_of)
def test_jobs_know_nothing_of_the_launcher(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"launcher", "launch", "hydra", "submitit"}


@pytest.mark.parametrize("path", sources("conf"), ids=name_of)
def test_conf_imports_only_omegaconf(path: Path) -> None:
    assert {name.split(".")[0] for name in imports(path)} <= sys.stdlib_module_names | {"conf", "omegaconf"}


MEMORY = ("counting", "activations", "storage", "footprint", "memory", "remedy", "fit")
PURE = ("checks", "plan", "render", "preview", "verdict", "hang", "overrides", *MEMORY)


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_neither_runs_programs_nor_reads_the_environment(name: str) -> None:
    assert not imports(ROOT / f"launcher/{name}.py") & {"os", "subprocess", "socket", "shutil", "tempfile"}


@pytest.mark.parametrize("name", MEMORY)
def test_an_estimate_reads_nothing_but_the_config(name: str) -> None:
    known = {
        "conf.batch",
        "conf.choices",
        "conf.mesh",
        "conf.schema",
        "collections.abc",
        "copy",
        "dataclasses",
        "enum",
        "typing",
    }
    assert imports(ROOT / f"launcher/{name}.py") <= known | {f"launcher.{other}" for other in MEMORY}


def test_only_the_worker_starts_a_job() -> None:
    users = [path.stem for path in sources("launcher") if any(name.split(".")[0] == "jobs" for name in imports(path))]
    assert users == ["worker"]


def test_only_one_module_runs_slurms_commands() -> None:
    users = {path.stem for path in sources("launcher") if "subprocess" in imports(path)}
    assert users == {"slurm", "snapshot", "__main__", "facts"}  # git, a pager, nvidia-smi
