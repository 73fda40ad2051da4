"""launcher/check/observe.py: what it reports about files, rows, folders, GPUs and secrets."""

import json
import os
from pathlib import Path

import pytest

from conf import resolve
from conf.choices import Precision
from launcher.check import local_gpus, localize, observe
from launcher.check.first_row import FirstRow
from tests.conftest import ROOT, Compose, Programs, put

ROW = {"instruction": "a", "output": "b"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to start in, with a home beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("rows.jsonl", "{here}/rows.jsonl"),
        ("~/rows.jsonl", "{home}/rows.jsonl"),
        ("{here}/rows.jsonl", "{here}/rows.jsonl"),
        ("examples/sample.jsonl", "{root}/examples/sample.jsonl"),
        ("owner/name", "owner/name"),
        ("nowhere.jsonl", "nowhere.jsonl"),
    ],
    ids=["here", "home", "absolute", "in the clone", "on the Hub", "nowhere"],
)
def test_existing_paths_become_absolute(compose: Compose, here: Path, given: str, found: str) -> None:
    names = {"here": here, "home": here.parent / "home", "root": ROOT}
    for folder in (here, here.parent / "home"):
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").touch()
    config = put(compose(), {"data.path": given.format(**names)})
    localize.localize(config, gpus=0)
    assert config.data.path == found.format(**names)


def test_the_current_folder_comes_before_the_clone(compose: Compose, here: Path) -> None:
    (here / "examples").mkdir()
    (here / "examples/sample.jsonl").touch()
    config = put(compose(), {"data.path": "examples/sample.jsonl", "run_dir": "runs/a", "tracker.uri": "./mlruns"})
    localize.localize(config, gpus=0)
    assert config.data.path == f"{here}/examples/sample.jsonl"
    assert config.run_dir == f"{here}/runs/a"
    assert config.tracker.uri == f"{here}/mlruns"


@pytest.mark.parametrize(
    ("words", "gpus", "expected"),
    [
        (["cluster=local"], 0, (2, 0, Precision.fp32)),
        (["cluster=local"], 1, (1, 1, Precision.auto)),
        (["cluster=local"], 8, (8, 8, Precision.auto)),
        (["cluster=local", "cluster.train.ranks_per_node=1"], 8, (1, 1, Precision.auto)),
        (["cluster=local", "cluster.train.ranks_per_node=2"], 1, (2, 2, Precision.auto)),  # rules.py refuses it
        (["cluster=local", "cluster.train.gpus_per_node=4"], 8, (4, 4, Precision.auto)),
        (["cluster=local", "cluster.train.gpus_per_node=0"], 8, (2, 0, Precision.fp32)),
        (["cluster=slurm"], 0, (8, 8, Precision.auto)),
        (["cluster=slurm", "cluster.train.gpus_per_node=null"], 8, (8, None, Precision.fp32)),  # rules.py refuses it
        (["cluster=slurm", "train.precision=fp32"], 0, (8, 8, Precision.fp32)),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else None,
)
def test_local_ranks_are_the_gpus_that_are_here(
    compose: Compose, words: list[str], gpus: int, expected: tuple[int, int | None, Precision]
) -> None:
    config = compose(*words, gpus=gpus)
    train = config.cluster.train
    assert (train.ranks_per_node, train.gpus_per_node, config.train.precision) == expected


@pytest.mark.parametrize(
    ("text", "columns", "error"),
    [
        (json.dumps(ROW) + "\n", ("instruction", "output"), None),
        ("\n\n" + json.dumps(ROW) + "\nnot json", ("instruction", "output"), None),
        (json.dumps([ROW, ROW]), ("instruction", "output"), None),
        (json.dumps([ROW], indent=2), ("instruction", "output"), None),
        (json.dumps(ROW, indent=2), ("instruction", "output"), None),
        (json.dumps({"version": 1, "data": [ROW]}), None, None),
        ("", None, "has no rows"),
        ("\n \n", None, "has no rows"),
        ("[]", None, "has no rows"),
        ('["a"]', None, "not an object"),
        ("7\n", None, "not an object"),
        ("instruction,output\na,b\n", None, "not valid JSON"),
        ('{"instruction": "a"', None, "not valid JSON"),
        (b'{"text": "\xff"}\n', ("text",), None),  # preprocess checks the rows
    ],
    ids=[
        *("a row", "blank lines before", "an array", "an indented array", "an indented row", "rows inside an object"),
        *("empty", "blank", "an empty array", "an array of text", "a number", "CSV", "half a row", "not UTF-8"),
    ],
)
def test_the_columns_are_those_of_the_first_row(
    compose: Compose, here: Path, text: str | bytes, columns: tuple[str, ...] | None, error: str | None
) -> None:
    path = here / "rows.jsonl"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    facts = observe.observe(put(compose(), {"data.path": str(path)}))
    assert [row.columns for row in facts.first_rows] == [columns]
    assert (error or "None") in str(facts.first_rows[0].error)


@pytest.mark.parametrize("value", ["owner/name", "rows.parquet", "folder"])
def test_other_files_than_json_are_left_to_the_job(compose: Compose, here: Path, value: str) -> None:
    (here / "folder").mkdir()
    facts = observe.observe(put(compose(), {"data.path": value}))
    assert facts.first_rows == (FirstRow("data.path"),)


@pytest.mark.parametrize(
    ("key", "value", "missing"),
    [
        ("data.path", "a.jsonl", True),
        ("data.path", "/nowhere/a", True),
        ("data.path", "owner/name", False),
        ("data.validation_path", "./a.json", True),
        ("data.path", "s3://bucket/a.jsonl", False),
        ("data.path", "https://host/a.jsonl.zst", False),
        ("data.validation_path", "hf://datasets/owner/name/a.parquet", False),
        ("data.path", "/nowhere/a.ndjson", True),
        ("data.path", "/nowhere:test", True),
        ("data.path", str(ROOT / "tests:test"), False),
        ("model.source", "~/models/llama", True),
        ("model.source", "owner/name", False),
        ("model.tokenizer", "/nowhere", True),
        ("generate.prompts", "prompts", True),
    ],
)
def test_a_missing_path_is_reported(compose: Compose, key: str, value: str, missing: bool) -> None:
    facts = observe.observe(put(compose(), {key: value}))
    assert facts.files_missing == (((key, value),) if missing else ())


def test_missing_prompts_are_reported_only_if_a_job_reads_them(compose: Compose) -> None:
    config = put(compose(), {"generate.prompts": "nowhere", "jobs": ["train"]})
    assert observe.observe(config).files_missing == ()


def test_a_run_folder_may_be_new_or_empty(compose: Compose, here: Path) -> None:
    (here / "empty").mkdir()
    for name in ("a/b/c", "empty"):
        facts = observe.observe(put(compose(), {"run_dir": str(here / name)}))
        assert (facts.existing, facts.run_dir_error) == (None, None)
    assert [path.name for path in here.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("run_dir", "error"),
    [
        ("thesis", "is not a run folder"),
        ("thesis/a.tex", "is not a run folder"),
        ("thesis/a.tex/run", "not a folder that you can write to"),
    ],
)
def test_a_run_folder_that_cannot_be_used_is_reported(compose: Compose, here: Path, run_dir: str, error: str) -> None:
    (here / "thesis").mkdir()
    (here / "thesis/a.tex").touch()
    facts = observe.observe(put(compose(), {"run_dir": str(here / run_dir)}))
    assert error in str(facts.run_dir_error)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_permission_is_reported(compose: Compose, here: Path) -> None:
    here.chmod(0o500)
    facts = observe.observe(put(compose(), {"run_dir": str(here / "run")}))
    assert "not a folder that you can write to" in str(facts.run_dir_error)


def test_a_run_folder_with_too_long_a_name_is_reported(compose: Compose, here: Path) -> None:
    assert observe.observe(put(compose(), {"run_dir": str(here / ("a" * 300))})).run_dir_error


def test_an_existing_run_is_read(compose: Compose, here: Path) -> None:
    stored = put(compose("train.seed=7"), {"run_dir": str(here)})
    resolve.save(stored, here / "config.yaml")
    assert observe.observe(put(compose(), {"run_dir": str(here)})).existing == stored


def test_missing_slurm_commands_are_reported(compose: Compose, programs: Programs) -> None:
    programs(sbatch="", squeue="")
    assert observe.observe(compose()).slurm_missing == ("srun", "scontrol")


@pytest.mark.parametrize(
    ("environ", "text", "missing"),
    [
        ({}, None, ("MY_TOKEN", "MY_KEY")),
        ({"MY_TOKEN": "1"}, None, ("MY_KEY",)),
        ({}, "MY_KEY=1\n", ("MY_TOKEN",)),
        ({"MY_TOKEN": "1"}, "# x\nMY_KEY = 1\n", ()),
    ],
    ids=["nowhere", "in the environment", "in the file", "in both"],
)
def test_secrets_are_looked_for_in_the_environment_and_in_the_file(
    compose: Compose,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    text: str | None,
    missing: tuple[str, ...],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    config = put(compose(), {"cluster.secrets": ["MY_TOKEN", "MY_KEY"], "cluster.secrets_file": "~/secrets"})
    if text is not None:
        (here.parent / "home").mkdir()
        (here.parent / "home/secrets").write_text(text)
        (here.parent / "home/secrets").chmod(0o600)
    assert observe.observe(config).secrets_missing == missing


def nvidia(root: Path, *names: str) -> None:
    """The files by which the kernel shows NVIDIA's GPUs."""
    (root / "dev").mkdir(exist_ok=True)
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").touch()
    for number, name in enumerate(names):
        (root / f"dev/nvidia{number}").touch()
        (root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0").mkdir(parents=True)
        information = root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0/information"
        information.write_text(f"Model: \t\t {name}\nIRQ:   \t\t 42\n")


@pytest.mark.parametrize(
    ("used", "torch", "devices", "text"),
    [
        (2, "2.13.0", None, "on 2 GPUs (NVIDIA H100 80GB HBM3)"),
        (0, "2.13.0", None, "on the CPU: 2 GPUs not used, because gpus_per_node=0"),
        (0, "2.13.0+cpu", None, "on the CPU: torch 2.13.0+cpu is built without GPUs"),
        (0, "2.13.0", "", "on the CPU: CUDA_VISIBLE_DEVICES= hides the GPUs"),
        (0, "2.13.0", "-1", "on the CPU: CUDA_VISIBLE_DEVICES=-1 hides the GPUs"),
    ],
)
def test_the_device_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: int, torch: str, devices: str | None, text: str
) -> None:
    nvidia(tmp_path, "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    monkeypatch.setattr(local_gpus.metadata, "version", lambda _: torch)
    assert local_gpus.described(used, tmp_path).startswith(text)
    assert local_gpus.usable(tmp_path) == (2 if torch == "2.13.0" and devices is None else 0)


def test_a_machine_without_gpus_says_so(tmp_path: Path) -> None:
    assert local_gpus.described(0, tmp_path) == "on the CPU: no GPU was found"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert "driver of the NVIDIA GPU is not loaded" in local_gpus.described(0, tmp_path)


def test_no_gpu_is_counted_if_none_is_visible() -> None:
    assert local_gpus.local_gpus() == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("set", "HERE/set"),
        ("set:test", "HERE/set:test"),
        ("info/dataset_info.json:mine", "HERE/info/dataset_info.json:mine"),
        ("owner/name:test", "owner/name:test"),
        ("set:test/x", "set:test/x"),
        ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl"),
    ],
)
def test_a_split_of_a_folder_gets_an_absolute_path(
    given: str, expected: str, compose: Compose, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    (here / "set").mkdir()
    (here / "info").mkdir()
    (here / "info/dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    config = put(compose(), {"data.path": given, "data.validation_path": given})
    localize.localize(config, 0)
    assert [config.data.path, config.data.validation_path] == [expected.replace("HERE", str(here))] * 2


def test_the_file_of_llama_factorys_entry_is_looked_at(compose: Compose, here: Path) -> None:
    (here / "dataset_info.json").write_text('{"a": {"file_name": "a.json"}, "b": {"file_name": "nowhere.json"}}')
    (here / "a.json").write_text(json.dumps([ROW]))
    for name, columns, missing in (
        ("a", ("instruction", "output"), ()),
        ("b", None, (("data.path", f"{here}/nowhere.json"),)),
    ):
        facts = observe.observe(put(compose(), {"data.path": str(here / "dataset_info.json"), "data.subset": name}))
        assert facts.first_rows == (FirstRow("data.path", columns),)
        assert facts.files_missing == missing


@pytest.mark.site(case="AMD GPUs", before="not counted: the machine had none", after="counted, with their memory")
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 2),
        ({"ROCR_VISIBLE_DEVICES": "1"}, 1),
        ({"HIP_VISIBLE_DEVICES": "0,1"}, 2),
        ({"HIP_VISIBLE_DEVICES": ""}, 0),
    ],
    ids=["all", "ROCR", "HIP", "none"],
)
def test_amds_gpus_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: int
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for node, version in enumerate((0, 90402, 90402)):  # the first is a CPU
        bank = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{node}/mem_banks/0"
        bank.mkdir(parents=True)
        (bank / "properties").write_text(f"heap_type 1\nsize_in_bytes {192 * 2**30}\nflags 0\n")
        (bank.parents[1] / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert local_gpus.local_gpus(tmp_path) == expected
    assert local_gpus.local_memory_gib(tmp_path) == 191
    assert "AMD gfx942" in local_gpus.described(1, tmp_path)
