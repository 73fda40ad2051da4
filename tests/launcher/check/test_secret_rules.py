"""launcher/check/secret_rules.py: no value of a config is a secret, since all of them are written to files."""

from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config
from launcher import environment, secrets_file
from launcher.check import command_line, observe, secret_rules
from launcher.check.observe import Facts
from tests.conftest import ROOT, Compose, put

TOKEN = "hf_" + "aB3" * 11
HEX = "0123456789abcdef0123456789abcdef01234567"


def messages(config: Config, facts: Facts | None = None) -> list[str]:
    return [str(problem) for problem in secret_rules.problems(config, facts or Facts())]


@pytest.mark.site(
    case="a password or a token stands in a config value: a proxy, a signed URL, a shell line",
    before="it went into config.yaml, run.json and the batch script",
    after="refused, with the key and without the value",
)
@pytest.mark.parametrize(
    ("values", "secret"),
    [
        ({"cluster.environment": {"http_proxy": "http://me:pw5@proxy:3128"}}, "pw5"),
        ({"cluster.environment": {"PGPASSWORD": "pw5"}}, "pw5"),
        ({"cluster.environment": {"ANY": TOKEN}}, TOKEN),
        ({"cluster.setup": ["cd /x", "export WANDB_API_KEY=pw5"]}, "pw5"),
        ({"cluster.setup": [f"pip install git+https://{TOKEN}@host/x"]}, TOKEN),
        ({"cluster.srun_args": ["--export=ALL,HF_TOKEN=pw5"]}, "pw5"),
        ({"cluster.cpu.sbatch": {"export": "ALL,HF_TOKEN=pw5"}}, "pw5"),
        ({"data.path": "https://host/f.jsonl?X-Amz-Signature=pw5&x=1"}, "pw5"),
        ({"data.path": "https://me:pw5@host/f.jsonl"}, "pw5"),
        ({"model.source": f"https://host/?token={HEX}"}, HEX),
        ({"data.template_kwargs": {"tools": [TOKEN]}}, TOKEN),
        ({"cluster.account": HEX}, HEX),
    ],
)
def test_a_secret_is_refused_and_not_shown(compose: Compose, values: dict[str, Any], secret: str) -> None:
    [message] = messages(put(compose("cluster=slurm", "model=llama8b"), values))
    assert message.startswith(next(iter(values)))
    assert "(hidden): " in message
    assert secret not in message
    assert "~/.config/muster/secrets" in message


@pytest.mark.parametrize(
    "values",
    [
        {"model.revision": HEX, "data.revision": HEX},
        {"cluster.environment": {"GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json", "NCCL_IB_PKEY": "0x7fff", "A": "http://p:1"}},
        {"cluster.setup": ["export HF_TOKEN=$(cat ~/token)", "source /opt/site.sh"]},
        {"data.fields": {"output": "key={{ key }}, password: {{ password }}"}},
        {"cluster.container.image": "docker://nvcr.io#nvidia/pytorch:24.01-py3"},
        {"cluster.environment": {"HF_TOKEN": ""}},
    ],
)  # fmt: skip
def test_an_ordinary_value_is_taken(compose: Compose, values: dict[str, Any]) -> None:
    assert messages(put(compose("cluster=slurm", "model=llama8b"), values)) == []


def test_values_of_variables_are_recognized(compose: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `${oc.env:HF_TOKEN}` puts them into the config, or the shell."""
    path = tmp_path / "secrets"
    path.write_text("ODD=from the file\n")
    path.chmod(0o600)
    monkeypatch.setenv("HF_TOKEN", "hf_SECRETENV")
    values = {
        "cluster.secrets": ["ODD"],
        "cluster.secrets_file": str(path),
        "cluster.account": "x hf_SECRETENV",
        "cluster.modules": ["cuda", "from the file"],
    }
    config = put(compose("cluster=slurm", "model=llama8b"), values | {"run_dir": str(tmp_path / "run")})
    facts = observe.observe(config)
    lines = messages(config, facts)
    assert [line.partition(",")[0] for line in lines] == [
        "cluster.account=(hidden): holds the value of HF_TOKEN",
        "cluster.modules=(hidden): holds the value of ODD",
    ]
    assert "SECRETENV" not in repr(facts)


def test_the_remedy_brings_a_value_to_the_job(compose: Compose, tmp_path: Path) -> None:
    config = put(
        compose("cluster=slurm", "model=llama8b"), {"cluster.environment": {"http_proxy": "http://me:pw5@proxy:1"}}
    )
    [message] = messages(config)
    assert "add cluster.secrets=[http_proxy] and put http_proxy=... into ~/.config/muster/secrets (mode 600)" in message
    path = tmp_path / "secrets"
    path.write_text("http_proxy=http://me:pw5@proxy:1\n")
    path.chmod(0o600)
    put(config, {"cluster.environment": {}, "cluster.secrets": ["http_proxy"], "cluster.secrets_file": str(path)})
    facts = observe.observe(put(config, {"run_dir": str(tmp_path / "run")}))
    assert messages(config, facts) == []
    assert environment.secret_values(config, {}, secrets_file.read(path)[0]) == {"http_proxy": "http://me:pw5@proxy:1"}


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("HF_TOKEN=hf_x\n", 0o644, "others may read or write it (mode 644). Type chmod 600 {path}"),
        ("HF_TOKEN=hf_x\n", 0o666, "others may read or write it (mode 666). Type chmod 600 {path}"),
        ("A=1\nHF_TOKEN\n", 0o600, "line 2 is not of the form NAME=value"),
        ("HF_TOKEN=\n", 0o600, "line 1 (HF_TOKEN) has no value"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_the_launch(
    compose: Compose, tmp_path: Path, content: str, mode: int, message: str
) -> None:
    path = tmp_path / "secrets"
    path.write_text(content)
    path.chmod(mode)
    values = {"cluster.secrets": ["HF_TOKEN"], "cluster.secrets_file": str(path), "run_dir": str(tmp_path / "run")}
    config = put(compose("cluster=slurm", "model=llama8b"), values)
    expected = f"cluster.secrets_file={path}: {message.format(path=path)}"
    assert [line for line in messages(config, observe.observe(config)) if line.startswith(expected)]
    put(config, {"cluster.secrets": []})  # no job needs it
    assert messages(config, observe.observe(config)) == []


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ([f"hydra.job.name={TOKEN}"], True),
        (["-m", f"cluster.account={TOKEN},b"], True),
        (["-m", f"model.revision={HEX},main"], False),
        (["hydra.verbose=true"], False),
    ],
)
def test_hydra_stores_no_secret(words: list[str], refused: bool) -> None:
    """It writes the words of a sweep to a file, and run.json has all words."""
    reported = [str(problem) for problem in command_line.problems(words, ROOT / "conf")]
    assert [line.partition("=")[2][:8] for line in reported] == (["(hidden)"] if refused else [])
