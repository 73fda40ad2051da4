"""launcher/secret_names.py: names and values that must not reach a file, and ordinary ones that may."""

import pytest

from launcher.secret_names import found, holds_secret, is_secret, known_values, masked

HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.site(
    case="a variable for a secret has an unusual name: PGPASSWORD, GITHUB_PAT, MYAUTH, OPENAI_KEY",
    before="its value went into files and logs",
    after="it counts as a secret",
)
@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "WANDB_API_KEY", "hf_token", "HFTOKEN", "HF_TOKEN_2", "TOKEN_HF", "hfToken", "myApiKey", "PGPASSWORD", "MYAUTH",
        "DB_PASS", "MYSQL_PWD", "OPENAI_KEY", "WANDB_APIKEY", "GITHUB_PAT", "AZURE_STORAGE_KEY", "SENTRY_DSN", "SLURM_JWT",
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GPG_PASSPHRASE", "COOKIE", "DOCKER_AUTH_CONFIG",
        "CLIENT_SECRET_ID", "SECRET_KEY_BASE", "SLACK_WEBHOOK_URL", "BEARER", "KAGGLE_KEY", "AUTH_HEADER", "MODAL_TOKEN_ID",
        "SSHPASS", "GOOGLE_APPLICATION_CREDENTIALS", "DB_CREDS", "SECRETS", "password",
    ],
)  # fmt: skip
def test_a_name_of_a_secret(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "MAX_TOKENS", "TOKENIZERS_PARALLELISM", "NUM_TOKENS", "PAD_TOKEN", "EOS_TOKEN_ID", "KEYBOARD", "MONKEY", "SSH_AUTH_SOCK",
        "XAUTHORITY", "GIT_AUTHOR_NAME", "PASSTHROUGH", "COMPASS", "NCCL_IB_PKEY", "UCX_IB_PKEY", "HF_TOKEN_PATH", "PWD", "OLDPWD",
        "PATH", "PYTHONPATH", "AWS_SHARED_CREDENTIALS_FILE", "KRB5CCNAME", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "LS_COLORS", "PATTERN",
        "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK", "TOKENIZER_PATH", "TOKEN_LENGTH",
    ],
)  # fmt: skip
def test_a_name_of_none(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"hf_{'aB3' * 11}", f"hf_{'aB3' * 11}"),
        (f"wandb login {HEX}", HEX),
        (HEX, HEX),
        (f"sk-proj-{'a1' * 20}", f"sk-proj-{'a1' * 20}"),
        (f"ghp_{'a1' * 18}", f"ghp_{'a1' * 18}"),
        (f"github_pat_{'a1' * 20}", f"github_pat_{'a1' * 20}"),
        (f"AKIA{'A1' * 8}", f"AKIA{'A1' * 8}"),
        (f"glpat-{'a1' * 10}", f"glpat-{'a1' * 10}"),
        ("http://user:pw@proxy:3128", "user:pw"),
        ("docker://me:pw@registry#image", "me:pw"),
        ("https://host/f?X-Amz-Algorithm=A&X-Amz-Signature=0a1b2c", "0a1b2c"),
        ("https://a.blob.core.windows.net/f?sv=1&sig=0a1b2c", "0a1b2c"),
        ("https://host/f?download_token=0a1b2c", "0a1b2c"),
        (f"pip install git+https://oauth2:glpat-{'a1' * 10}@host/x.git", f"glpat-{'a1' * 10}"),
        (f"pip install git+https://{'a1' * 10}@github.com/o/n", "a1" * 10),
        ("--export=ALL,HF_TOKEN=abc", "abc"),
        ("export PGPASSWORD='abc'", "abc"),
        ("tool --password abc", "abc"),
        ("curl -H 'Authorization: Bearer abcdefgh12'", "abcdefgh12"),
        ("eyJhbGciOiJI.eyJzdWIiOiI.abc", "eyJhbGciOiJI.eyJzdWIiOiI.abc"),
    ],
)  # fmt: skip
def test_a_secret_is_found_by_its_form(text: str, secret: str) -> None:
    assert secret in [value for _, value in found(text)]
    assert secret not in masked(text)
    assert holds_secret("ANY", text)


@pytest.mark.parametrize(
    "text",
    [
        "o/n", "s3://bucket/key=5/a.parquet", "https://host/a?x=1&y=2", "ssh://git@github.com/o/n", "http://proxy:3128",
        "docker://nvcr.io/nvidia/pytorch:24.01-py3", f"docker://pytorch:24@sha256:{'0a' * 32}", "export HF_TOKEN=$(cat ~/token)",
        "export HF_TOKEN=$OTHER", "http://$USER:$PASSWORD@proxy", "--mpi=pmix", "--export=NONE", "{{ title }}: {{ body }}",
        f"https://huggingface.co/o/n/resolve/{HEX}/f", f"o/n@{HEX}", "a token of text",
        "#SBATCH --comment=night", "sk-learn", "hf_home",
    ],
)  # fmt: skip
def test_an_ordinary_text_has_no_secret(text: str) -> None:
    assert list(found(text)) == []
    assert masked(text) == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("USE_AUTH", "true"),
        ("AUTH", ""),
    ],
)  # fmt: skip
def test_a_path_or_a_switch_is_no_secret(name: str, value: str) -> None:
    assert not holds_secret(name, value)


def test_secrets_of_the_environment_are_found_in_other_texts() -> None:
    known = known_values(
        {"HF_TOKEN": "hf_SECRETENV", "MINE": "abcd", "HOME": "/home/me", "MAX_TOKENS": "12345678"}, frozenset({"MINE"})
    )
    assert known == {"HF_TOKEN": "hf_SECRETENV", "MINE": "abcd"}
    assert list(found("x-hf_SECRETENV", known)) == [("the value of HF_TOKEN", "hf_SECRETENV")]
    assert [kind for kind, _ in found("abcd", known)] == ["the value of MINE"]
    assert list(found("abcdefgh", known)) == []


@pytest.mark.parametrize(
    ("line", "hidden"),
    [
        ("  WANDB_API_KEY: abcdef0123456789", True),
        ('+password = "hunter2secret99"', True),
        (f"+wandb_key: {HEX}", True),
        (f"+  revision: {HEX}", False),
        ("    token = tokenizer.eos_token", False),
        ("eos_token_id: 128009", False),
        ('API_KEY = os.environ["API_KEY"]', False),
        ("rows.sort(key=lambda row: row[0])", False),
    ],
)  # fmt: skip
def test_code_has_names_of_ordinary_variables(line: str, hidden: bool) -> None:
    assert ("(hidden)" in masked(line, is_code=True)) is hidden
