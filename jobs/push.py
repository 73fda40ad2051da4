"""The job `push`: uploads RUN/model, with its model card, to a repository of the Hub.

RUN/model stays as it is, also if this fails. RUN/hub.json says what was pushed.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem, RunError, first_line
from conf.files import read_json, write_json
from conf.schema import Config

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

REPLACED = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_model*.safetensors",
    "adapter_config.json",
]
"""Files of an earlier model in the repository, which from_pretrained would prefer to those of this one. They are deleted."""


def run(config: Config) -> None:
    """Create the repository, upload, and compare the files there with those here. Does nothing if they are there already.

    Raises RunError if there is no verified model, or if the Hub refuses; ConnectionError if the upload breaks off.
    """
    folder = Path(config.run_dir) / "model"
    merged = read_json(folder / "muster.json")
    if merged is None or not merged.get("verified"):
        message = f"there is no model here that was merged and verified. Merge it first: muster merge {config.run_dir}"
        raise RunError(Problem("model", folder, message))
    hub = config.hub
    asked = {"repository": str(hub.push), "revision": hub.revision or "main", "tag": hub.tag, "model": merged}
    with _explained(config):
        api = _api(config)
        pushed = read_json(folder.parent / "hub.json")
        if pushed is not None and pushed | asked == pushed and _is_there(api, pushed):
            log.info(f"model was pushed before: {pushed['url']}")
            return
        _create(api, config)
        commit = _upload(api, config, folder)
        _compare(api, config, folder, commit)
        if hub.tag:
            api.create_tag(str(hub.push), tag=hub.tag, revision=commit)
    url = f"{api.endpoint}/{hub.push}/tree/{commit}"
    write_json(folder.parent / "hub.json", asked | {"commit": commit, "url": url})
    log.info(f"pushed    {url}")


def _api(config: Config) -> "HfApi":
    from huggingface_hub import HfApi

    name = config.hub.token
    token = os.environ.get(name) if name else None  # noqa: TID251 (the name of a variable is all that the config has)
    if name and not token:
        raise RunError(
            Problem("hub.token", name, "this variable has no value in the job: add it to cluster.secrets_file")
        )
    return HfApi(token=token)


def _is_there(api: "HfApi", pushed: dict[str, Any]) -> bool:
    """Whether the Hub still has the commit of an earlier push."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        api.repo_info(pushed["repository"], revision=pushed["commit"])
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return False
    return True


def _create(api: "HfApi", config: Config) -> None:
    """Create repository and branch if there are none. Raises RunError for a public one where a private one is asked for."""
    hub, repository = config.hub, str(config.hub.push)
    api.create_repo(repository, private=hub.private, exist_ok=True)
    if hub.private and not api.repo_info(repository).private:
        message = (
            "everybody can read this repository, but hub.private=true. Push to another one, or set hub.private=false"
        )
        raise RunError(Problem("hub.push", repository, message))
    if hub.revision:
        api.create_branch(repository, branch=hub.revision, exist_ok=True)


def _upload(api: "HfApi", config: Config, folder: Path) -> str:
    """Upload the folder in one commit, and return it."""
    result = api.upload_folder(
        repo_id=str(config.hub.push),
        folder_path=folder,
        revision=config.hub.revision,
        commit_message=f"{config.name}: upload by Muster",
        delete_patterns=REPLACED,
    )
    return str(result.oid)


def _compare(api: "HfApi", config: Config, folder: Path, commit: str) -> None:
    """Raise RunError if a file there is missing, or has another size than here."""
    info = api.model_info(str(config.hub.push), revision=commit, files_metadata=True)
    there = {item.rfilename: item.size for item in info.siblings or ()}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and there.get(name) != path.stat().st_size:
            found = f"{there[name]} bytes" if name in there else "missing"
            message = f"{name} has {path.stat().st_size} bytes here, and is {found} there. Push again: muster push {config.run_dir}"
            raise RunError(Problem("hub.push", config.hub.push, message))


@contextmanager
def _explained(config: Config) -> Iterator[None]:
    """Say that the model is safe and how to push it later, whatever the Hub's client raises."""
    from huggingface_hub.errors import HfHubHTTPError

    later = f"{config.run_dir}/model is complete. Push it later: muster push {config.run_dir}"
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # the client raises those of httpx, requests and hf_xet, as installed
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        reason = _reason(error)
        if 400 <= status < 500 and status not in (408, 429):
            raise RunError(Problem("hub.push", config.hub.push, f"the Hub refuses: {reason}. {later}")) from error
        problem = Problem("hub.push", config.hub.push, f"the upload broke off: {reason}. {later}")
        raise ConnectionError(str(problem)) from error


def _reason(error: BaseException) -> str:
    """The Hub's reason in one line, without addresses that the client adds."""
    from_server = getattr(error, "server_message", None) or ""
    return f"{first_line(error)} {from_server}".rstrip(". ")
