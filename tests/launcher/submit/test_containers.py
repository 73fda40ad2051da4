"""Ranks in a container whose file system really hides what is not mounted: a small `apptainer` made of namespaces and chroot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf import resolve
from conf.files import read_json
from conf.schema import Config
from launcher import containers
from launcher.check import container_paths
from launcher.plan import plan
from launcher.submit import render
from tests.conftest import ROOT, Compose, Programs, put, tool

APPTAINER = """\
#!/bin/bash
# `exec [--bind A:B[:ro]]... [--flag]... IMAGE COMMAND...` as apptainer does it: the container sees the image and the mounts only.
[ "$1" = --version ] && { echo "apptainer version 1.3.4"; exit; }
shift
binds=() clean=
while [ "${1#-}" != "$1" ]; do
  case $1 in --bind) binds+=("$2"); shift ;; --cleanenv) clean=1 ;; *) echo "$1" >> FLAGS ;; esac; shift
done
[ -f "$1" ] || { echo "FATAL: no image $1" >&2; exit 255; }
shift
root=$(mktemp -d /tmp/container.XXXX)
mount -t tmpfs none "$root"
attach() { # SOURCE TARGET OPTIONS
  if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")" && touch "$root$2"; fi
  mount --bind "$1" "$root$2" || { echo "FATAL: mount $1: no such file" >&2; exit 255; }
  [ "$3" != ro ] || mount -o remount,bind,ro "$root$2"
}
for part in /usr /bin /lib /lib64 /sbin /etc /dev /proc IMAGE; do [ ! -e "$part" ] || attach "$part" "$part" ''; done
for bind in "${binds[@]}"; do IFS=: read -r from to how <<< "$bind"; attach "$from" "$to" "$how"; done
for name in $(compgen -e); do
  case $name in
    APPTAINERENV_*) passed+=("${name#APPTAINERENV_}=${!name}") ;;
    HOME | PATH) passed+=("$name=${!name}") ;;
    *) [ -n "$clean" ] || passed+=("$name=${!name}") ;;
  esac
done
exec chroot "$root" /usr/bin/env -i "${passed[@]}" "$@"
"""
RANK = """
import json, os, pathlib
from conf import resolve
from jobs.distributed.rank import rank_and_world_size
def run(name, path):
    config = resolve.load(pathlib.Path(path))
    seen = {key: os.path.exists(value) for key, value in json.loads(os.environ["LOOK"]).items()}
    for folder in (config.run_dir, os.environ["CACHE"], os.environ["HF_HOME"]):
        (pathlib.Path(folder) / "written").touch()
    pathlib.Path(config.run_dir, "seen.json").write_text(json.dumps(seen | {"environ": dict(os.environ)}))
"""


@pytest.fixture
def site(compose: Compose, tmp_path: Path, programs: Programs) -> Config:
    """A run in a container, on a site whose data, model, cache, secrets and scratch lie in different folders."""
    image = tmp_path / "image.sif"
    for name in ("data", "blobs", "model", "hf", "fast/7", "runs/run/jobs/train", "home", "mlruns"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("image.sif", "data/rows.jsonl", "blobs/weights", "home/secrets", "prompts.jsonl"):
        (tmp_path / name).write_text("NODE_KEY=1\n")
    (tmp_path / "model/model.safetensors").symlink_to(tmp_path / "blobs/weights")
    config = compose("experiment=llama8b_fsdp", "pipeline=train")
    put(
        config,
        {"run_dir": f"{tmp_path}/runs/run", "cluster.python": sys.executable, "cluster.container.image": str(image)},
    )
    put(config, {"data.path": f"{tmp_path}/data/rows.jsonl", "model.source": f"{tmp_path}/model"})
    put(config, {"cluster.hf_home": f"{tmp_path}/hf", "cluster.scratch": f"{tmp_path}/fast/$SLURM_JOB_ID"})
    put(config, {"tracker.uri": f"file://{tmp_path}/mlruns/new"})  # MLflow makes it
    put(config, {"cluster.secrets": ["NODE_KEY"], "cluster.secrets_file": f"{tmp_path}/home/secrets"})
    code = Path(config.run_dir) / "code"
    code.mkdir()
    for name in ("conf", "launcher", "slurm_templates"):
        shutil.copytree(ROOT / name, code / name)
    shutil.copytree(ROOT / "jobs/distributed", code / "jobs/distributed")
    (code / "jobs/__init__.py").write_text(RANK)
    folder = programs(srun='shift 3; while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"')
    in_image = " ".join(sorted({sys.base_prefix, sys.prefix, str(Path(sys.executable).resolve().parents[1])}))
    (folder / "apptainer").write_text(APPTAINER.replace("IMAGE;", f"{in_image};").replace("FLAGS", f"{tmp_path}/flags"))
    (folder / "apptainer").chmod(0o755)
    return config


def batch(config: Config) -> dict[str, object]:
    """Run the batch script in a mount namespace of its own, with no process of Slurm. Returns what the rank saw."""
    container_paths.localize(config)
    resolve.save(config, Path(config.run_dir) / "config.yaml")
    [job] = [job for job in plan(config) if job.name == "train"]
    base = Path(config.run_dir).parents[1]
    looked_for = {
        name: f"{base}/{name}"
        for name in ("data", "blobs", "model", "hf", "fast/7", "home/secrets", "mlruns", "image.sif", "prompts.jsonl")
    }
    environ = {
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "SLURM_JOB_ID": "7", "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "CACHE": containers.cache(config), "CUDA_VISIBLE_DEVICES": "1",
        "LOOK": str(looked_for).replace("'", '"'), "APPTAINERENV_LOOK": str(looked_for).replace("'", '"'),
        "APPTAINERENV_CACHE": containers.cache(config),
    }  # fmt: skip
    script = render.script_text(config, job, Path(config.run_dir) / "config.yaml")
    command = [tool("unshare"), "--mount", tool("bash"), "-s"]
    done = subprocess.run(command, input=script, env=environ, cwd="/", capture_output=True, text=True, timeout=60)
    if "not permitted" in done.stderr:
        pytest.skip("needs root, to make a mount namespace")
    found = read_json(Path(config.run_dir) / "seen.json")
    log = Path(config.run_dir, "jobs/train/attempt-1/rank-%t.log")
    assert isinstance(found, dict), done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    return found


@pytest.mark.site(
    case="a container",
    before="the token cache, data, models and secrets were not mounted",
    after="all that jobs read or write is",
)
@pytest.mark.parametrize("flags", [[], ["--cleanenv"]], ids=["the host's environment", "--cleanenv"])
def test_a_rank_sees_what_the_jobs_read_and_write(site: Config, flags: list[str]) -> None:
    found = batch(put(site, {"cluster.container.flags": flags}))
    assert {name for name, seen in found.items() if seen is False} == {"image.sif", "prompts.jsonl"}
    environ = found["environ"]
    assert isinstance(environ, dict)
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["CUDA_VISIBLE_DEVICES"]) == ("3", "1", "1")
    assert environ["NODE_KEY"] == "1"
    assert environ["TRITON_CACHE_DIR"].startswith(f"{Path(site.run_dir).parents[1]}/fast/7/")
    for folder in (site.run_dir, containers.cache(site), site.cluster.hf_home):
        assert Path(str(folder), "written").exists()


@pytest.mark.parametrize(("flags", "expected"), [([], ["--nv"]), (["--rocm"], ["--rocm"])], ids=["NVIDIA", "AMD"])
def test_a_rank_gets_the_gpus_of_its_node(site: Config, flags: list[str], expected: list[str], tmp_path: Path) -> None:
    batch(put(site, {"cluster.container.flags": flags}))
    assert (tmp_path / "flags").read_text().split() == expected


def test_a_folder_that_the_user_mounts_elsewhere_keeps_its_place(site: Config, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    put(site, {"cluster.container.mounts": [f"{tmp_path}/other:{tmp_path}/inside", f"{tmp_path}/hf"]})
    batch(site)
    targets = [mount.target for mount in containers.mounts(site)]
    assert targets.count(f"{tmp_path}/hf") == 1
    assert f"{tmp_path}/inside" in targets


def test_a_variable_that_the_node_lacks_is_named_in_the_verdict(site: Config) -> None:
    put(site, {"cluster.scratch": "$NOT_SET_HERE/x"})
    with pytest.raises(AssertionError, match="NOT_SET_HERE is not set on this node"):
        batch(site)
    verdict = read_json(Path(site.run_dir) / "jobs/train/attempt-1.json")
    assert isinstance(verdict, dict)
    assert verdict["status"] == "user_error"
    assert "cluster.scratch" in verdict["reason"]


def test_a_file_of_secrets_that_is_not_there_is_not_mounted(site: Config, tmp_path: Path) -> None:
    (tmp_path / "home/secrets").unlink()
    put(site, {"cluster.environment": {"NODE_KEY": "1"}})  # as if it were exported
    assert batch(site)["home/secrets"] is False


def test_a_node_without_the_program_says_so(site: Config) -> None:
    put(site, {"cluster.container.program": "/no/apptainer"})
    with pytest.raises(AssertionError, match=r"set cluster\.container\.program to its path"):
        batch(site)
