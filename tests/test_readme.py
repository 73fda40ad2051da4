"""What the README says: its commands run, what it shows is what they print, and its table names every option."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from launcher.__main__ import COMMANDS
from launcher.check import command_line
from tests.launcher.check import wrong_configs

CLONE = Path(__file__).resolve().parents[1]
README = (CLONE / "README.md").read_text(encoding="utf-8")


def block(mark: str) -> list[str]:
    """The lines of the code block that follows `<!-- mark -->`."""
    return re.search(rf"<!-- {mark} -->\n```\n(.*?)```", README, re.DOTALL)[1].splitlines()


def test_the_preview_is_what_dry_run_prints():
    command, *shown = block("preview")
    words = shlex.split(command.removeprefix("$ python "))
    printed = subprocess.run(
        [sys.executable, *words], cwd=CLONE, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    missing = [line for line in shown if line != "..." and line not in printed]
    assert not missing


def test_the_table_names_every_option_of_every_group():
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.MULTILINE))
    for group, options in command_line.groups(CLONE / "conf").items():
        assert set(options) <= set(re.findall(r"\w+", table[group])), group


def test_make_targets_exist_and_make_alone_lists_them():
    listed = subprocess.run(["make"], cwd=CLONE, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"make ([a-z-]+)", README)) | {
        "help",
        "setup",
        "lint",
        "format",
        "check",
        "slurm-up",
        "slurm-down",
        "clean",
    }
    assert not [target for target in named if not re.search(rf"^{target}\s", listed, re.MULTILINE)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge"], "name the run, as in make merge RUN=runs/..."),
        (["status", "RUN=x", "V=/none/bin"], "Muster is not installed here. Type make setup"),
    ],
)
def test_a_target_of_a_run_says_what_is_missing_at_once(words: list[str], said: str) -> None:
    done = subprocess.run(["make", *words], cwd=CLONE, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_links_lead_somewhere():
    pages = [CLONE / "README.md", *CLONE.glob("docs/*.md")]
    dead = [
        link
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not dead


def documented_commands() -> list[str]:
    """The words of each command line of the README and the docs that launches, without those that name a file of one's own."""
    pages = [
        CLONE / "README.md",
        *sorted(set(CLONE.glob("docs/*.md")) - {CLONE / "docs/terminal.md"}),
    ]  # it shows a mistake
    texts = [page.read_text().replace("\\\n", " ") for page in pages]
    lines = [line.split(" #")[0].split(" | ")[0].strip() for text in texts for line in text.splitlines()]
    lines = [line.replace("muster sweep ", "muster run -m ") for line in lines]
    found = [
        match[1] for line in lines if (match := re.fullmatch(r"(?:\$ )?(?:python launch\.py|muster run) (.*)", line))
    ]
    return [
        words.replace("cluster=mine", "cluster=slurm") for words in found if not re.search(r"\.\.\.|their|FILE", words)
    ]


def test_every_documented_command_of_muster_is_one() -> None:
    pages = [CLONE / "README.md", *CLONE.glob("docs/*.md")]
    named = {verb for page in pages for verb in re.findall(r"(?:`|^)muster ([a-z]+) ", page.read_text(), re.MULTILINE)}
    assert named and named <= set(COMMANDS)


ONE_GPU = re.findall(
    r"^\| .* \| `(.*)` \| `(.*)` \| ([\d.]+) \|$", (CLONE / "docs/one-gpu.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize(("memory", "model", "estimate"), ONE_GPU)
def test_the_page_on_one_gpu_shows_todays_estimates(memory, model, estimate, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["launch.py"])
    one = [f"cluster.train.{key}=1" for key in ("nodes", "ranks_per_node", "gpus_per_node")]
    words = ["cluster=slurm", "data=alpaca", "data.max_length=2048", *one, *memory.split(), *model.split()]
    assert launch.main([*words, "hub.check=false", "dry_run=true"]) == 0
    assert f"train: {estimate} of {memory.partition('=')[2]} GiB per GPU" in capsys.readouterr().out


@pytest.mark.parametrize("words", documented_commands())
def test_no_documented_command_is_refused(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.argv", ["launch.py"])  # launch.main changes it
    wrong_configs.write_files(tmp_path)
    (tmp_path / "my.jsonl").write_bytes((tmp_path / "chats.jsonl").read_bytes())
    (tmp_path / "code.parquet").write_bytes(b"PAR1")
    (tmp_path / "ds_config.json").write_text("{}")
    (tmp_path / "train.py").write_text("")
    assert wrong_configs.outcome(words, tmp_path) == (0, "")
