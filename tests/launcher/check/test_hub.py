"""Before anything is queued: may the run read from the Hub, write to it, and start without it? Against a Hub on this machine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conf.choices import Where
from launcher.check import hub_access, hub_rules, observe
from launcher.check.hub_files import HubHome
from tests.conftest import Compose, Launch, put
from tests.hub_server import Hub, account

CONFIG = b'{"model_type": "llama"}'
MODEL = {"config.json": CONFIG, "model.safetensors": b"x", "tokenizer.json": b"{}"}
ROWS = {"README.md": b"", "train.jsonl": b'{"text": "a"}\n'}
WORDS = ("model=hub", "model.source=owner/model", "data=jsonl", "data.path=owner/rows")
Ask = Callable[..., list[str]]


@pytest.fixture
def ask(compose: Compose, hub: Hub, tmp_path: Path) -> Ask:
    """`ask(token="hf_r", words=[...], **keys)`: the problems that a launch reports."""
    hub.tokens["hf_r"] = account("reader", "read")

    def found(token: str | None = None, words: tuple[str, ...] = WORDS, **keys: object) -> list[str]:
        config = put(compose(*words), {name.replace("__", "."): value for name, value in keys.items()})
        environ = {"HF_ENDPOINT": hub.endpoint} | ({"HF_TOKEN": token} if token else {})
        facts = hub_access.look(config, HubHome(tmp_path, tmp_path / "hub", environ))
        return [*map(str, hub_rules.problems(config, facts)), *facts.notes]

    return found


def test_a_path_beside_sets_is_left_to_the_rules_of_data(ask: Ask, hub: Hub) -> None:
    hub.add("model", "owner/model", MODEL)
    hub.add("dataset", "owner/rows", ROWS)
    assert ask(words=(*WORDS, "+data.sets.chats.path=owner/missing")) == []
    assert "owner/missing" in ask(words=(*WORDS, "data.path=null", "+data.sets.chats.path=owner/missing"))[0]


@pytest.mark.parametrize("token", [None, "hf_r"])
def test_public_repositories_need_no_token(ask: Ask, hub: Hub, token: str | None) -> None:
    hub.add("model", "owner/model", MODEL)
    hub.add("dataset", "owner/rows", ROWS)
    assert ask(token) == []


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (
            None,
            "this model is gated, and there is no token. Accept its conditions at {hub}/owner/model, then export HF_TOKEN",
        ),
        (
            "hf_r",
            "is gated, and the account of the token has no access (403). Accept its conditions at {hub}/owner/model and",
        ),
        (
            "hf_bad",
            "the Hub refuses the token (401): it is wrong or revoked. Make one at https://huggingface.co/settings",
        ),
        ("hf_ok", None),
    ],
)
def test_a_gated_model_names_the_page_to_accept(ask: Ask, hub: Hub, token: str | None, expected: str | None) -> None:
    hub.tokens["hf_ok"] = account("friend")
    hub.add("model", "owner/model", MODEL, gated_for=("friend",))
    hub.add("dataset", "owner/rows", ROWS)
    found = [line for line in ask(token) if line.startswith("model.source=owner/model: ")]
    assert len(found) == (expected is not None)
    if expected:
        assert expected.replace("{hub}", hub.endpoint) in found[0]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (
            None,
            "data.path=owner/rows: no such data set here or on the Hub, or a private one. Check the name; for a private",
        ),
        (
            "hf_r",
            "data.path=owner/rows: no such data set on the Hub, or a private one that the token may not read. Check",
        ),
        ("hf_own", None),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_private_data_set_looks_like_a_missing_one(
    ask: Ask, hub: Hub, token: str | None, expected: str | None, exists: bool
) -> None:
    hub.tokens["hf_own"] = account("owner")
    hub.add("model", "owner/model", MODEL)
    if exists:
        hub.add("dataset", "owner/rows", ROWS, private=True)
    found = ask(token)
    if exists and token == "hf_own":
        assert found == []
    elif expected:
        assert len(found) == 1 and expected in found[0]


def test_a_gated_set_among_several_is_named(ask: Ask, hub: Hub) -> None:
    hub.add("model", "owner/model", MODEL)
    hub.add("dataset", "owner/rows", ROWS)
    hub.add("dataset", "owner/more", ROWS, gated_for=())
    words = (*WORDS[:2], "data=mix", "+data.sets.a.path='owner/rows:train[:10]'", "+data.sets.b.path=owner/more:test")
    [line] = ask("hf_r", words)
    assert line.startswith("data.sets.b.path=owner/more: this data set is gated")
    assert f"{hub.endpoint}/datasets/owner/more" in line


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model__revision", "v9", "model.revision=v9: owner/model on the Hub has no such commit, branch or tag"),
        ("data__revision", "v9", "data.revision=v9: owner/rows on the Hub has no such commit, branch or tag"),
        ("model__tokenizer", "owner/other", "model.tokenizer=owner/other: no such model here or on the Hub"),
        ("data__validation_path", "owner/held:test", "data.validation_path=owner/held: no such data set here"),
        ("model__source", "owner/empty", "model.source=owner/empty: has no config.json on the Hub"),
    ],
)
def test_each_repository_and_revision_is_asked_for(ask: Ask, hub: Hub, key: str, value: str, expected: str) -> None:
    hub.add("model", "owner/model", MODEL)
    hub.add("model", "owner/empty", {"model.gguf": b""})
    hub.add("dataset", "owner/rows", {"train.jsonl": b""})  # no README.md
    [line] = ask(**{key: value})
    assert line.startswith(expected)


def test_the_token_goes_to_no_other_server(ask: Ask, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub redirects to its storage."""
    hub.add("model", "owner/model", MODEL)
    hub.add("dataset", "owner/rows", ROWS)
    hub.redirects = "http://127.0.0.1:9/storage"
    assert ask("hf_r") == []


def test_without_network_nothing_is_refused(ask: Ask, hub: Hub, compose: Compose, tmp_path: Path) -> None:
    facts = hub_access.look(compose(*WORDS), HubHome(tmp_path, tmp_path / "hub", {"HF_ENDPOINT": "http://127.0.0.1:9"}))
    assert (facts.refusals, facts.writer, len(facts.notes)) == ((), None, 1)
    assert "http://127.0.0.1:9 cannot be asked from here (" in facts.notes[0]


def test_a_model_in_the_cache_is_not_asked_for(ask: Ask, hub: Hub, tmp_path: Path) -> None:
    """The jobs take it from there, whatever the Hub answers."""
    hub.add("dataset", "owner/rows", ROWS)
    snapshot = cache(tmp_path, MODEL)
    assert ask() == []
    (snapshot / "tokenizer.json").unlink()
    assert len(ask()) == 1


def cache(home: Path, files: dict[str, bytes], commit: str = "a" * 40) -> Path:
    """A model in the cache, as huggingface_hub lays it out."""
    repository = home / "hub/models--owner--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


FINE = {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "me"}, "permissions": ["repo.write"]}]}}
FINE_READ = {
    "role": "fineGrained",
    "fineGrained": {"scoped": [{"entity": {"name": "me"}, "permissions": ["repo.content.read"]}]},
}
FINE_REPO = {
    "role": "fineGrained",
    "fineGrained": {"scoped": [{"entity": {"name": "me/x"}, "permissions": ["repo.write"]}]},
}
WRITERS = {
    "write": (account("me"), None),
    "organization": (account("you", orgs={"me": "write"}), None),
    "fine-grained": (account("me", **FINE), None),
    "fine-grained for this": (account("me", **FINE_REPO), None),
    "none": (None, "there is no token to push with: HF_TOKEN has no value. Make one that may write at https://hugg"),
    "wrong": ({}, "the Hub refuses the token (401): it is wrong, expired or revoked. Make one that may write"),
    "read": (
        account("me", "read"),
        "the token may not write there (403): it is one for reading. Make one that may write",
    ),
    "other user": (
        account("you"),
        "may not write there (403): it belongs to you, who is not in me. Use hub.push=you/x",
    ),
    "reader": (
        account("you", orgs={"me": "read"}),
        "may not write there (403): you may only read in me. Ask its admin",
    ),
    "fine-grained read": (
        account("me", **FINE_READ),
        "(403): its permissions do not include writing to me. Add them at",
    ),
}


@pytest.mark.parametrize(("whoami", "expected"), WRITERS.values(), ids=list(WRITERS))
def test_the_token_must_be_able_to_push(
    ask: Ask, hub: Hub, whoami: dict[str, object] | None, expected: str | None
) -> None:
    if whoami:
        hub.tokens["hf_w"] = whoami
    token = None if whoami is None else "hf_w"
    found = ask(token, ("model=tiny",), hub__push="me/x", jobs=["consolidate", "push"])
    assert len(found) == (expected is not None)
    if expected:
        assert found[0].startswith("hub.push=me/x: ") and expected in found[0]


def test_a_public_repository_is_not_pushed_to_unless_asked_for(ask: Ask, hub: Hub) -> None:
    hub.tokens["hf_w"] = account("me")
    hub.add("model", "me/x", {})
    [line] = ask("hf_w", ("model=tiny",), hub__push="me/x", jobs=["push"])
    assert line.startswith("hub.push=me/x: everybody can read this repository, but hub.private=true")
    assert ask("hf_w", ("model=tiny",), hub__push="me/x", hub__private=False, jobs=["push"]) == []
    hub.repositories["model", "me/x"].private = True
    assert ask("hf_w", ("model=tiny",), hub__push="me/x", jobs=["push"]) == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"hub__push": "mine"}, "hub.push=mine: is not the name of a repository. Write owner/name"),
        ({"hub__push": "me/a--b"}, "hub.push=me/a--b: is not the name of a repository"),
        ({"hub__token": "hf_abcdefghijklmnop"}, "hub.token=(hidden): must be the name of an environment variable"),
        ({"hub__push": "me/x", "cluster__offline": True}, "with network: muster push RUN hub.push=me/x"),
        ({"jobs": ["push"]}, "hub.push=null: names no repository to push to. Add hub.push=owner/name"),
        (
            {"hub__where": Where.job, "jobs": ["fetch"]},
            "hub.where=job: cluster=local has no jobs of Slurm. Use hub.where=here",
        ),
    ],
)
def test_keys_that_cannot_work(ask: Ask, keys: dict[str, object], expected: str) -> None:
    [line] = ask(None, ("model=tiny",), **keys)
    assert expected in line
    assert "hf_abc" not in line


def test_a_launch_refuses_before_anything_is_written(launch: Launch, hub: Hub, tmp_path: Path) -> None:
    done = launch("hub.push=me/x", env={"HF_ENDPOINT": hub.endpoint})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("launch.py: hub.push=me/x: there is no token to push with: HF_TOKEN has no value.")
    assert list(tmp_path.iterdir()) == []


def test_a_token_of_another_name_comes_from_the_secrets_file(
    compose: Compose, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens |= {"hf_r": account("reader", "read"), "hf_w": account("me")}
    monkeypatch.setenv("HF_TOKEN", "hf_r")
    secrets = tmp_path / "secrets"
    keys = {"hub.push": "me/x", "hub.token": "MY_TOKEN", "jobs": ["push"], "cluster.secrets_file": str(secrets)}
    config = put(compose("model=tiny"), keys)
    secrets.write_text("MY_TOKEN=hf_w\n")
    assert hub_rules.problems(config, observe.observe(config).hub) == []
    secrets.write_text("OTHER=hf_w\n")
    [problem] = hub_rules.problems(config, observe.observe(config).hub)
    assert str(problem).startswith("hub.push=me/x: there is no token to push with: MY_TOKEN has no value.")


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (None, "this model"),
        ({"config.json": CONFIG, "model.safetensors": b""}, "the tokenizer"),
        ({"tokenizer.json": b"{}", "model.safetensors": b""}, "config.json"),
        ({"tokenizer.json": b"{}", "config.json": CONFIG}, "model.safetensors"),
        (
            {
                "tokenizer.json": b"{}",
                "config.json": CONFIG,
                "model.safetensors.index.json": b'{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}',
                "m-1.safetensors": b"",
            },
            "m-2.safetensors",
        ),
        (MODEL, None),
    ],
)
def test_an_offline_run_needs_its_files_in_the_cache(
    compose: Compose, tmp_path: Path, files: dict[str, bytes] | None, what: str | None
) -> None:
    """The remedy is a command: tests/jobs/test_fetch.py runs it."""
    if files is not None:
        cache(tmp_path, files)
    copy = tmp_path / "datasets/owner___rows/default/0.0.0/abc"
    config = compose(*WORDS, "cluster.offline=true", f"cluster.hf_home={tmp_path}", "pipeline=train")
    assert ("data.path", "owner/rows", "the rows") in observe.observe(config).hub.missing
    copy.mkdir(parents=True)
    (copy / "dataset_info.json").write_text("{}")
    facts = observe.observe(config).hub
    assert facts.missing == ((("model.source", "owner/model", what),) if what else ())
    if what:
        [problem] = hub_rules.problems(config, facts)
        assert (
            f"cluster.offline=true, and the Hub's cache on this machine lacks {what}. Fetch it where" in problem.message
        )


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (
            ["/x/muster/launch.py", "model=hub", "data.path=a b", "run_dir=r"],
            "python launch.py model=hub 'data.path=a b' pipeline=fetch",
        ),
        (["muster run", "pipeline=train", "+data.sets.a.path=o/n"], "muster run +data.sets.a.path=o/n pipeline=fetch"),
        (["muster resume", "resume=runs/a"], "muster run resume=runs/a pipeline=fetch"),
    ],
)
def test_the_command_that_fetches(words: list[str], command: str) -> None:
    assert hub_rules.fetch_command(words) == command
