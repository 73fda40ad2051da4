"""Refuses a run that could not read from the Hub, or could not push to it; pure. `hub_access` and `hub_files` looked."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conf.choices import Where
from conf.errors import Problem
from conf.schema import Config
from launcher import plan
from launcher.check.hub_access import HubFacts, Refusal, Writer

SETTINGS = "https://huggingface.co/settings/tokens"
REPOSITORY = re.compile(r"(?!.*(--|\.\.))(?!.{97})[A-Za-z0-9][\w.-]*/[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?")
"""What the Hub takes as `owner/name`."""
ADDRESS = re.compile(
    r"(?:(?:https://(?:huggingface\.co|hf\.co)|hf:/)/)?([\w.-]+/[\w.-]+)(?:@([\w.-]+)|/(?:tree|blob)/([\w.-]+).*)?/?"
)
"""Other ways to write a repository of the Hub: its page, or with a revision."""
LATER = "Remove hub.push, and push afterwards from a node with network: muster push RUN hub.push="


def problems(config: Config, facts: HubFacts) -> list[Problem]:
    """Everything that stands between the run and the Hub."""
    return [
        *_names(config),
        *_keys(config),
        *(_refused(config, facts, item) for item in facts.refusals),
        *_writing(config, facts),
        *_offline(facts),
    ]


def _names(config: Config) -> Iterator[Problem]:
    """Names that are neither a path nor a repository of the Hub. `localize` has made the paths of what exists absolute."""
    for key, value in (("model.source", config.model.source), ("model.tokenizer", config.model.tokenizer)):
        if not value or value.startswith(("/", ".", "~")) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
            continue
        message = "is neither a folder on this machine nor a repository of the Hub, owner/name"
        name = ADDRESS.fullmatch(value)
        if name:
            revision = f" {key.replace('source', 'revision')}={name[2] or name[3]}" if name[2] or name[3] else ""
            message += f". Write {key}={name[1]}{revision if key == 'model.source' else ''}"
        else:
            message += ". Copy the model to a folder, and name that"
        yield Problem(key, value, message)


def _keys(config: Config) -> Iterator[Problem]:
    hub = config.hub
    if hub.token is not None and (not re.fullmatch(r"[A-Za-z_]\w*", hub.token) or re.match(r"hf_\w{8}", hub.token)):
        message = "must be the name of an environment variable, because its value would be written to files. "
        yield Problem(
            "hub.token", "(hidden)", message + "Export the token, for example as HF_TOKEN: hub.token=HF_TOKEN"
        )
    if hub.push is not None and not REPOSITORY.fullmatch(hub.push):
        yield Problem("hub.push", hub.push, "is not the name of a repository. Write owner/name: hub.push=owner/name")
    if "push" in config.jobs and hub.push is None:
        yield Problem("hub.push", "null", "names no repository to push to. Add hub.push=owner/name")
    if hub.push is not None and config.cluster.offline and "consolidate" in config.jobs:
        message = f"the job that pushes would have no network, because cluster.offline=true. {LATER}{hub.push}"
        yield Problem("hub.push", hub.push, message)
    if hub.where is Where.job and config.jobs and plan.runs_here(config):
        yield Problem("hub.where", "job", "cluster=local has no jobs of Slurm. Use hub.where=here, or cluster=slurm")


def _refused(config: Config, facts: HubFacts, refusal: Refusal) -> Problem:
    """Why the run may not read a repository, and what to do."""
    item, reply = refusal.repository, refusal.reply
    page = f"{facts.endpoint}/{'datasets/' if item.kind == 'dataset' else ''}{item.name}"
    kind = "data set" if item.kind == "dataset" else "model"
    give = "export HF_TOKEN=... or type hf auth login"
    if config.cluster.hf_home:
        give = f"export HF_TOKEN=... or type HF_HOME={config.cluster.hf_home} hf auth login"
    if refusal.has_token and not refusal.token_is_valid:
        message = (
            f"the Hub refuses the token ({reply.status}): it is wrong or revoked. Make one at {SETTINGS}, then {give}"
        )
    elif reply.code == "GatedRepo" and not refusal.has_token:
        message = f"this {kind} is gated, and there is no token. Accept its conditions at {page}, then {give}"
    elif reply.code == "GatedRepo":
        message = (
            f"this {kind} is gated, and the account of the token has no access ({reply.status}). Accept its conditions at "
            f"{page} and wait until they are granted; a fine-grained token must also allow reading of gated repositories"
        )
    elif reply.code == "RevisionNotFound":
        key = f"{item.key.rpartition('.')[0]}.revision"
        return Problem(
            key, item.revision, f"{item.name} on the Hub has no such commit, branch or tag. See {page}/commits"
        )
    elif reply.code == "EntryNotFound":
        message = f"has no config.json on the Hub, so that it is no model of transformers. Choose another: see {page}"
    elif reply.status == 403:
        message = f"the token may not read this {kind} (403). Allow it at {SETTINGS}, or give another token: {give}"
    elif refusal.has_token:
        message = f"no such {kind} on the Hub, or a private one that the token may not read. Check the name: {page}"
    else:
        message = f"no such {kind} here or on the Hub, or a private one. Check the name; for a private one {give}"
    return Problem(item.key, item.name, message)


def _writing(config: Config, facts: HubFacts) -> Iterator[Problem]:
    writer, name, repository = facts.writer, config.hub.token or "HF_TOKEN", str(config.hub.push)
    if writer is None:
        return
    make = f"Make one that may write at {SETTINGS}, and export {name}=..."
    if not writer.has_token:
        login = "" if config.hub.token else ", or type hf auth login"
        yield Problem("hub.push", repository, f"there is no token to push with: {name} has no value. {make}{login}")
    elif not writer.valid:
        yield Problem(
            "hub.push", repository, f"the Hub refuses the token (401): it is wrong, expired or revoked. {make}"
        )
    elif reason := _why_not(writer, repository):
        yield Problem("hub.push", repository, f"the token may not write there (403): {reason}")
    elif writer.public and config.hub.private:
        message = (
            "everybody can read this repository, but hub.private=true. Push to another one, or set hub.private=false"
        )
        yield Problem("hub.push", repository, message)


def _why_not(writer: Writer, repository: str) -> str | None:
    """Why a valid token may not write to a repository, and what to do; None if nothing speaks against it."""
    account = writer.account or {}
    owner, user = repository.partition("/")[0], str(account.get("name"))
    roles = {str(item.get("name")).lower(): item.get("roleInOrg") for item in account.get("orgs") or ()}
    if owner.lower() not in (user.lower(), *roles):
        return f"it belongs to {user}, who is not in {owner}. Use hub.push={user}/{repository.partition('/')[2]}"
    if roles.get(owner.lower()) == "read":
        return f"{user} may only read in {owner}. Ask its administrators, or use another owner"
    token: Mapping[str, Any] = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return f"it is one for reading. Make one that may write at {SETTINGS}"
    if token.get("role") == "fineGrained" and not _may_write(token.get("fineGrained") or {}, owner, repository):
        return f"its permissions do not include writing to {owner}. Add them at {SETTINGS}"
    return None


def _may_write(permissions: Mapping[str, Any], owner: str, repository: str) -> bool:
    """Whether a fine-grained token may write to the owner's repositories, or to this one."""
    for scope in permissions.get("scoped") or ():
        entity = str((scope.get("entity") or {}).get("name", "")).lower()
        if entity in (owner.lower(), repository.lower()) and "repo.write" in (scope.get("permissions") or ()):
            return True
    return False


def _offline(facts: HubFacts) -> Iterator[Problem]:
    command = fetch_command(facts.command)
    for key, value, what in facts.missing:
        if not what:
            message = "cannot be read, because cluster.offline=true. Give the name of the set, owner/name, or a file"
        else:
            message = (
                f"cluster.offline=true, and the Hub's cache on this machine lacks {what}. "
                f"Fetch it where there is a network: {command}"
            )
        yield Problem(key, value, message)


def fetch_command(words: Sequence[str]) -> str:
    """The command that downloads what the command line `words` needs."""
    left_out = re.compile(r"\+*(pipeline|run_dir|jobs|submit|dry_run|hub\.push)=")
    program = ["muster", "run"] if words and not words[0].endswith("launch.py") else ["python", "launch.py"]
    return shlex.join([*program, *(word for word in words[1:] if not left_out.match(word)), "pipeline=fetch"])
