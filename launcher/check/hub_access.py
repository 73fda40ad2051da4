"""Asks the Hub whether the run may read what it names, and write where it pushes.

It only reports: `launcher.check.hub_rules` decides what is wrong.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from conf.choices import Init
from conf.schema import Config
from launcher.check.hub_files import HubHome, Repository, is_cached, repositories
from launcher.hub_client import HubClient, Reply, Unreachable, endpoint, stored_token


@dataclass(frozen=True)
class Refusal:
    """A repository that the run may not read."""

    repository: Repository
    reply: Reply
    has_token: bool
    token_is_valid: bool


@dataclass(frozen=True)
class Writer:
    """What the Hub says about the token that pushes."""

    has_token: bool
    valid: bool = False
    account: Mapping[str, Any] | None = None
    """Its answer to whoami: name, organizations, and what the token may do."""
    public: bool = False
    """The repository exists, and everybody can read it."""


@dataclass(frozen=True)
class HubFacts:
    """What the Hub answered, or what its cache lacks."""

    endpoint: str = ""
    refusals: tuple[Refusal, ...] = ()
    writer: Writer | None = None
    """None if nothing is pushed, or if the Hub cannot be asked."""
    missing: tuple[tuple[str, str, str], ...] = ()
    """(key, value, what is missing) of what an offline run needs and the cache does not have."""
    command: tuple[str, ...] = ()
    """The command line of an offline run, from which the one that fetches is made."""
    notes: tuple[str, ...] = ()
    """Lines to print."""


def look(config: Config, hub: HubHome) -> HubFacts:
    """Ask about every repository that the run reads or writes. Without network: a note, because the jobs may have one."""
    address = endpoint(hub.environ)
    try:
        return HubFacts(address, tuple(_refusals(config, hub)), _writer(config, hub))
    except Unreachable as error:
        return HubFacts(
            address, notes=(f"hub       {address} cannot be asked from here ({error}); the jobs will ask it",)
        )


def push(config: Config, hub: HubHome) -> HubFacts:
    """The same for what the run writes alone."""
    address = endpoint(hub.environ)
    try:
        return HubFacts(address, writer=_writer(config, hub))
    except Unreachable as error:
        return HubFacts(address, notes=(f"hub       {address} cannot be asked from here ({error})",))


def _refusals(config: Config, hub: HubHome) -> Iterator[Refusal]:
    client = HubClient(endpoint(hub.environ), _token(hub, None))
    for item in dict.fromkeys(repositories(config)):
        if is_cached(config, item, hub.cache):
            continue
        folder, file = ("datasets/", "README.md") if item.kind == "dataset" else ("", "config.json")
        revision = quote(item.revision or "main", safe="")
        reply = client.ask(f"/{folder}{item.name}/resolve/{revision}/{file}", "HEAD")
        no_file = reply.code == "EntryNotFound" and not (
            item.key == "model.source" and config.model.init is Init.pretrained
        )
        if reply.status < 400 or no_file or (reply.status == 404 and not reply.code):
            continue
        valid = client.token is not None and client.ask("/api/whoami-v2").status == 200
        yield Refusal(item, reply, client.token is not None, valid)


def _writer(config: Config, hub: HubHome) -> Writer | None:
    if config.hub.push is None or "push" not in config.jobs:
        return None
    client = HubClient(endpoint(hub.environ), _token(hub, config.hub.token))
    if client.token is None:
        return Writer(has_token=False)
    account = client.ask("/api/whoami-v2")
    if account.status != 200 or not isinstance(account.content, dict):
        return Writer(has_token=True)
    existing = client.ask(f"/api/models/{config.hub.push}").content
    public = isinstance(existing, dict) and existing.get("private") is False
    return Writer(True, True, account.content, public)


def _token(hub: HubHome, name: str | None) -> str | None:
    """The value of the variable `name`, or, without a name, the token that the jobs find."""
    if name is not None:
        return "".join(hub.environ.get(name, "").split()) or None
    return stored_token(hub.environ, hub.home)
