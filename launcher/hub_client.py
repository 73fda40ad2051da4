"""Asks the Hub a few questions over HTTP. Standard library only: a login node need not have huggingface_hub.

`HF_ENDPOINT` names another Hub, as for huggingface_hub.
"""

import json
import os.path
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HUB = "https://huggingface.co"
TIMEOUT_S = 8
"""Many login nodes drop packets to the internet: the launch then waits this long, once."""


@dataclass(frozen=True)
class Reply:
    """The Hub's answer to one question."""

    status: int
    code: str = ""
    """Its X-Error-Code: GatedRepo, RepoNotFound, RevisionNotFound, EntryNotFound, or empty."""
    content: Any = None
    """The JSON of the answer, if it is JSON."""


class Unreachable(Exception):
    """No answer: no network, no such host, a broken certificate, or a server in trouble."""


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the token must not go to another server. That there is one says enough."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True)
class HubClient:
    """The Hub, as one user sees it."""

    endpoint: str
    token: str | None = field(repr=False)

    def ask(self, path: str, method: str = "GET") -> Reply:
        """Send one request. Raises Unreachable if there is no answer."""
        headers = {"User-Agent": "muster"} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        try:
            request = urllib.request.Request(self.endpoint + path, headers=headers, method=method)  # noqa: S310 (the user's own endpoint)
            with urllib.request.build_opener(_StayHere).open(request, timeout=TIMEOUT_S) as answer:
                return Reply(answer.status, content=_json(answer.read()))
        except urllib.error.HTTPError as answer:
            if answer.code >= 500 or answer.code in (407, 408, 429):
                raise Unreachable(f"{answer.code} {answer.reason}") from None
            return Reply(answer.code, answer.headers.get("X-Error-Code", ""))
        except (OSError, ValueError) as error:  # ValueError: an endpoint that is no address, a token with line ends
            raise Unreachable(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def endpoint(environ: Mapping[str, str]) -> str:
    """The address of the Hub."""
    return (environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def stored_token(environ: Mapping[str, str], hf_home: Path) -> str | None:
    """The token that huggingface_hub finds: HF_TOKEN, or that of `hf auth login`."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := "".join(environ.get(name, "").split()):
            return token
    path = Path(os.path.expandvars(environ.get("HF_TOKEN_PATH") or hf_home / "token")).expanduser()
    try:
        return "".join(path.read_text(encoding="utf-8").split()) or None
    except (OSError, UnicodeDecodeError):
        return None
