"""launch.py as a user starts it: what is refused, in words and with exit code 2, and what a preview shows and leaves alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf import resolve
from launcher.check import command_line
from tests.conftest import ROOT, Launch, bare, python

MISSION = ("cluster=slurm", "model=llama70b", "parallel=zero3")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with rows, a regular file, and a run."""
    for name, row in {"odd": {"question": "a", "reply": "b"}, "messages": {"messages": []}}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "file").write_text("a thesis\n")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").touch()
    return tmp_path


def refused(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """The problems that were printed, each a line; nothing else was."""
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("launch.py: ")
    return done.stderr.removeprefix("launch.py: ").splitlines()


MISTAKES = {
    "model=llama7b": "model=llama7b: no such option: did you mean 'llama70b'? Choose from",
    "trian.steps=7": "trian.steps: no such key: did you mean 'train.steps'?",
    "+train.stepz=7": "train.stepz: no such key: did you mean 'train.steps'?",
    "cluster.train.nodes=-1": "cluster.train.nodes=-1: must be at least 1",
    "data.path=nowhere.jsonl": "data.path=nowhere.jsonl: no such file or folder",
    "data=jsonl": "data.path: needs a value. Add data.path=... to the command",
    "data=mix": "data.path: training rows are missing. Set data.path=..., or data.sets.NAME.path=...",
    "data=mix data.sets.a.pth=x": "data.sets.a.pth: no such key: did you mean 'path'?",
    "data=mix data.sets.a.path=nowhere.jsonl": "data.sets.a.path=nowhere.jsonl: no such file or folder",
    "data=mix data.sets.a.path=messages.jsonl data.sets.a.weight=0": "data.sets.a.weight=0.0: must be at least 0.0001",
    "data.split=first": "data.split=first: is not a range of rows. Write [:1000], [10%:] or [-100:]",
    "model=hub": "model.source: needs a value. Add model.source=... to the command",
    "data.path=messages.jsonl data.format=alpaca": "but alpaca needs instruction and output",
    "run_dir=file/run": "run_dir={here}/file/run: {here}/file is not a folder that you can write to. Choose another",
    "run_dir=thesis": "run_dir={here}/thesis: already exists and is not a run folder. Choose another run_dir",
    "train.learning_rate=1e-5,2e-5": "train.learning_rate=1e-5,2e-5: has several values. Add -m to start one run for each",
    "cluster.train.gpus_per_node=2": "cluster.train.gpus_per_node=2: this machine has 0 GPUs. Set cluster.train.gpus_per_node=0",
    "train.global_batch=7": "train.global_batch=7: must be divisible by the 2 ranks of cluster.train. Use 6 or 8",
    "cluster=slurm model=llama8b": "cluster=slurm: Slurm's sbatch is not on PATH. Run this on a login node",
    "cluster.secrets=[MY_TOKEN]": "cluster.secrets=MY_TOKEN: MY_TOKEN has no value. Export it, or add MY_TOKEN=... to ~/.config",
    "resume=thesis": "resume=thesis: is not a run folder: it has no config.yaml",
    "--config-name nowhere": "--config-name: every run begins with Muster's own config",
    "data.path=odd.jsonl": "{here}/odd.jsonl: has the columns question, reply, but alpaca needs instruction",
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.items(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_with_key_value_and_remedy(
    launch: Launch, files: Path, words: str, expected: str
) -> None:
    [line] = refused(launch(*words.split()))
    assert expected.replace("{here}", str(files)) in line


def test_all_mistakes_of_a_kind_are_named_at_once(launch: Launch) -> None:
    lines = refused(launch("modle=tiny", "train.steps=many", "nonsense"))
    assert [line.split(":")[0] for line in lines] == ["modle", "train.steps=many", "nonsense"]
    lines = refused(launch("train.global_batch=7", "data.path=a.jsonl", "cluster.train.nodes=2"))
    assert [line.split(":")[0] for line in lines] == [
        "train.global_batch=7",
        "cluster.train.nodes=2",
        "data.path=a.jsonl",
    ]


@pytest.mark.parametrize("word", ["cluster.environment.MY_API_KEY=s3cr3t", "cluster.environment={HF_TOKEN:s3cr3t}"])
def test_a_secret_is_refused_and_not_repeated(launch: Launch, tmp_path: Path, word: str) -> None:
    [line] = refused(launch(word))
    assert "(hidden): would be written to files. Remove it, add cluster.secrets=[" in line
    assert "s3cr3t" not in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_only_says_no_when_written_to_is_refused(launch: Launch) -> None:
    done = launch("run_dir=/proc/run", "jobs=[preprocess]")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("launch.py: run_dir=/proc/run: cannot be written: ")


def test_a_folder_whose_name_is_too_long_is_refused(launch: Launch) -> None:
    refused(launch(f"run_dir={'a' * 300}"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was written and not started."""
    base = tmp_path_factory.mktemp("stored")
    words = ("cluster=slurm", "model=llama8b", "submit=script", "run_dir=run")
    done = python(ROOT / "launch.py", *words, cwd=base, env=bare(base))
    assert done.returncode == 0, done.stderr
    return base / "run"


def test_a_run_folder_of_another_config_is_refused(launch: Launch, stored: Path) -> None:
    before = (stored / "config.yaml").read_text()
    words = ("cluster=slurm", "model=llama8b", "submit=script", "run_dir=run", "train.seed=7")
    [line] = refused(launch(*words, cwd=stored.parent))
    assert line.startswith(
        f"run_dir={stored}: already holds a run with train.seed=0 (now 7). Use another run_dir, or continue"
    )
    assert (stored / "config.yaml").read_text() == before


def test_a_resumed_run_refuses_another_seed(launch: Launch, stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    [line] = refused(launch("resume=run", "train.seed=7", "submit=script"))
    assert line.startswith("train.seed: cannot change in a run that has trained. Start a new run")


def test_a_run_goes_on_from_a_chosen_checkpoint_with_another_rate(launch: Launch, stored: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stored, run)
    for step in (5, 10):
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    words = ["resume=run", "train.resume_step=5", "train.learning_rate=0.5"]
    preview = launch(*words, "dry_run=true")
    assert "resume    from the checkpoint of step 5; the newer ones (10) " in preview.stdout, preview.stderr
    assert (run / "checkpoints/step-00000010").exists()  # a preview changes nothing
    done = launch(*words, "submit=script")
    assert "to 0.5: after step 5 the schedule is that of 0.5" in done.stdout, done.stderr
    assert (run / "checkpoints/replaced-1/step-00000010").exists()
    config = resolve.load(run / "config.yaml")
    assert (config.train.resume_step, config.train.learning_rate) == (None, 0.5)


def test_groups_of_another_folder(launch: Launch, tmp_path: Path) -> None:
    """As Hydra's users keep the files of a site outside of the clone."""
    (tmp_path / "site/cluster").mkdir(parents=True)
    text = (ROOT / "conf/cluster/slurm.yaml").read_text()
    (tmp_path / "site/cluster/ours.yaml").write_text(text.replace("name: slurm", "name: ours\naccount: ours"))
    for flag in (["--config-dir", "site"], ["--config-dir=site"], ["-cd", "site"]):
        done = launch(*flag, "cluster=ours", "dry_run=true")
        assert "#SBATCH --account=ours" in done.stdout, done.stderr
    [line] = refused(launch("--config-dir", "site", "cluster=our"))
    assert "did you mean 'ours'?" in line
    done = launch("-m", "--config-dir", "site", "cluster=ours", "cluster.gpus=8,16", "dry_run=true")
    assert [line for line in done.stdout.splitlines() if "cluster.gpus=" in line][:2] == [
        "          cluster.gpus=8",
        "          cluster.gpus=16",
    ]
    assert "#SBATCH --account=ours" in done.stdout, done.stderr


def test_a_run_that_has_not_trained_can_be_mended(launch: Launch, stored: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stored, run)
    (run / "data").mkdir()
    (run / "data/data.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 2.0}\n')
    preview = launch("resume=run", "train.learning_rate=0.5", "data.max_length=64", "dry_run=true")
    assert preview.returncode == 0, preview.stderr
    assert (run / "data/data.json").exists()  # a preview changes nothing
    same = launch("resume=run", "train.steps=70", "submit=script")
    assert same.returncode == 0, same.stderr
    assert (run / "data/data.json").exists()
    done = launch("resume=run", "train.learning_rate=0.5", "data.max_length=64", "submit=script")
    assert done.returncode == 0, done.stderr
    assert "changed   data, metrics.jsonl of this run will be made again" in done.stdout
    mended = resolve.load(run / "config.yaml")
    assert (mended.train.learning_rate, mended.data.max_length, mended.train.steps) == (0.5, 64, 70)
    assert mended.model.name == resolve.load(stored / "config.yaml").model.name
    assert not (run / "data").exists()


def test_a_resumed_run_takes_more_steps(launch: Launch, stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "run")
    done = launch("resume=run", "train.steps=70", "submit=script")
    assert done.returncode == 0, done.stderr
    assert resolve.load(tmp_path / "run/config.yaml").train.steps == 70


def test_a_resumed_run_takes_another_variable(launch: Launch, stored: Path) -> None:
    done = launch(f"resume={stored}", "cluster.environment.NCCL_DEBUG=INFO", "dry_run=true")
    assert "export NCCL_DEBUG=INFO" in done.stdout


def contents(folder: Path) -> set[str]:
    """Every path below a folder but for caches."""
    found = set()
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        found |= {str(Path(path, name)) for name in (*folders, *names)}
    return found


@pytest.fixture(scope="module")
def preview(tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    """The mission command with dry_run=true, on a machine with nothing on PATH, which it leaves as it was."""
    base = tmp_path_factory.mktemp("preview")
    env = bare(base)
    before = contents(ROOT), contents(base)
    done = python(ROOT / "launch.py", *MISSION, "dry_run=true", cwd=base, env=env)
    assert (contents(ROOT), contents(base)) == before
    return done


def test_a_preview_works_where_nothing_is_installed(preview: "subprocess.CompletedProcess[str]") -> None:
    assert (preview.returncode, preview.stderr) == (0, "")


@pytest.mark.parametrize("job", ["preprocess", "train", "consolidate", "evaluate", "generate"])
def test_a_preview_shows_the_script_and_the_environment_of_every_job(
    preview: "subprocess.CompletedProcess[str]", job: str
) -> None:
    script = preview.stdout.partition(f"==== {job}: sbatch =")[2].partition("\n==== ")[0]
    assert f"#SBATCH --job-name=llama70b-sample-zero3/{job}\n" in script
    assert f"export MUSTER_JOB={job}\n" in script
    assert "srun " in script
    environment = preview.stdout.partition(f"==== {job}: environment =")[2].partition("\n==== ")[0]
    assert f"\nMUSTER_JOB={job}\n" in environment


def test_a_preview_begins_with_the_run_in_short(preview: "subprocess.CompletedProcess[str]") -> None:
    summary = preview.stdout.partition("\n\n")[0]
    for words in (
        "llama70b (meta-llama/Llama-3.1-70B-Instruct)",
        "precision auto, zero3",
        "4 nodes x 8 GPUs, 32 ranks, 1440 min",
    ):
        assert words in summary


def test_a_preview_names_the_base_under_an_adapter(launch: Launch) -> None:
    done = launch("experiment=llama70b_lora_float8", "dry_run=true")
    assert "adapter lora on a base in float8\n" in done.stdout
    assert "1 node x 1 GPU, 1 rank" in done.stdout


def test_a_preview_of_a_local_run_has_no_sbatch_text(launch: Launch, tmp_path: Path) -> None:
    done = launch("dry_run=true")
    assert (done.returncode, done.stderr) == (0, "")
    assert "==== train: local" in done.stdout
    assert "#SBATCH" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_preview_of_several_values_is_one_run_each(launch: Launch, tmp_path: Path) -> None:
    done = launch("-m", "train.seed=7,8", "dry_run=true", "run_dir=sweep")
    assert (done.returncode, done.stderr) == (0, "")
    device, first, *runs = done.stdout.splitlines()[:4]
    assert device.startswith("device    on ")
    assert first == f"sweep     {tmp_path}/sweep: 2 runs"
    assert [line.strip() for line in runs] == ["train.seed=7", "train.seed=8"]
    assert list(tmp_path.iterdir()) == []


def test_all_runs_of_a_sweep_are_checked_before_any_starts(launch: Launch, tmp_path: Path) -> None:
    lines = refused(launch("-m", "trian.steps=7", "train.seed=7,8", "model=tiny,lama8b"))
    assert lines[0] == "trian.steps: no such key: did you mean 'train.steps'?"
    assert lines[1].startswith("model=lama8b: no such option: did you mean 'llama8b'? Choose from")
    [line] = refused(launch("-m", "train.global_batch=8,7,6", "train.seed=7,8"))
    assert line.startswith("train.global_batch=7: must be divisible by the 2 ranks of cluster.train. Use 6 or 8 (in ")
    assert list(tmp_path.iterdir()) == []


def test_a_setting_of_a_sweep_has_no_effect_on_one_run(launch: Launch) -> None:
    [line] = refused(launch("sweep.at_once=2"))
    assert line.startswith("sweep.at_once=2: has no effect on one run. Give several values of a key")


def test_help_lists_the_groups_and_their_options(launch: Launch) -> None:
    done = launch("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for group, options in command_line.groups(ROOT / "conf").items():
        assert f"{group}: {', '.join(options)}" in done.stdout


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train.learning_rate"], ["Peak learning rate, after warmup", "a number, 1e-20 to 100", "standard: 1e-05"]),
        (["train.optimizer"], ["one of adamw, adamw_8bit", "default   adamw", "example   train.optimizer=adamw_8bit"]),
        (["cluster"], ["cluster=local|slurm", "cluster.train.partition", "cluster.gpus"]),
        (["data.sets.NAME.weight"], ["How often each row is used", "at least 0.0001"]),
    ],
)
def test_help_explains_a_key(launch: Launch, words: list[str], shown: list[str]) -> None:
    done = launch("--help", *words)
    assert (done.returncode, done.stderr) == (0, "")
    for text in shown:
        assert text in done.stdout


def test_help_for_a_key_that_does_not_exist_names_similar_ones(launch: Launch) -> None:
    done = launch("--help", "train.learning_rat", "warmup")
    assert done.returncode == 2
    assert "train.learning_rat: no such key. Similar: train.learning_rate" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_completion_is_printed(launch: Launch, shell: str) -> None:
    done = launch("-sc", f"install={shell}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "hydra_" in done.stdout


def test_a_key_is_completed(launch: Launch, surroundings: dict[str, str]) -> None:
    surroundings["COMP_LINE"] = "launch.py train.warmup_r"
    assert launch("-sc", "query=bash").stdout.split() == ["train.warmup_ratio="]


def test_a_key_of_muster_run_is_completed(surroundings: dict[str, str], tmp_path: Path) -> None:
    env = surroundings | {"COMP_LINE": "muster run train.warmup_r", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launcher", "-sc", "query=bash"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["train.warmup_ratio="], done.stderr


def test_the_composed_config_can_be_printed(launch: Launch) -> None:
    done = launch("--cfg", "job", *MISSION)
    assert (done.returncode, done.stderr) == (0, "")
    assert "zero_stage: 3" in done.stdout


def test_a_preview_can_be_cut_short(surroundings: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), *MISSION, "dry_run=true"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=surroundings, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
