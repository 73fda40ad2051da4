"""The record of what `pipeline=fetch` has downloaded: which commit of each repository. It lies beside the Hub's cache.

The job writes it, and the launcher pins an offline run to these commits.
"""

from pathlib import Path

from conf.files import read_json, write_json

NAME = "muster-fetched.json"
Commits = dict[str, str]
"""`model owner/name main` -> commit."""


def key(kind: str, repository: str, revision: str | None) -> str:
    """How the record names a repository at the revision that was asked for. `kind` is `model` or `dataset`."""
    return f"{kind} {repository} {revision or 'main'}"


def read(hf_home: Path) -> Commits:
    """The record in a HF_HOME; empty if nothing was fetched, or if it cannot be read."""
    try:
        found = read_json(hf_home / NAME)
    except (OSError, ValueError):
        return {}
    return {str(name): str(commit) for name, commit in found.items()} if isinstance(found, dict) else {}


def add(hf_home: Path, commits: Commits) -> None:
    """Add to the record in a HF_HOME. Raises OSError if it cannot be written."""
    write_json(hf_home / NAME, read(hf_home) | commits)
