"""Pins an offline run to the commits that `pipeline=fetch` has downloaded."""

from collections.abc import Iterator
from pathlib import Path

from conf import fetched, resolve
from conf.schema import Config
from conf.schema_model import Data, DataSet
from launcher.check.hub_files import hub_name, is_hub_id


def pin(config: Config, home: Path) -> None:
    """Set the revisions of the model and of the training sets to the commits in the record of HF_HOME, in place.

    A run that is launched again keeps its commits: somebody may have fetched newer ones in the meantime.
    """
    commits = fetched.read(home) | _of_run(Path(config.run_dir) / "config.yaml")
    if is_hub_id(config.model.source):
        name = fetched.key("model", config.model.source, config.model.revision)
        config.model.revision = commits.get(name, config.model.revision)
    for repository, data in _on_hub(config.data):
        name = fetched.key("dataset", repository, data.revision)
        data.revision = commits.get(name, data.revision)


def _of_run(stored: Path) -> fetched.Commits:
    """The commits of a run that is launched again, for revisions that its command does not name."""
    if not stored.exists():
        return {}
    config, found = resolve.load(stored), {}
    if config.model.revision:
        found[fetched.key("model", config.model.source, None)] = config.model.revision
    for repository, data in _on_hub(config.data):
        if data.revision:
            found[fetched.key("dataset", repository, None)] = data.revision
    return found


def _on_hub(data: Data) -> Iterator[tuple[str, Data | DataSet]]:
    """(repository, the section that names it) of the training sets on the Hub."""
    for section in (data, *data.sets.values()):
        if section.path and (repository := hub_name(section)):
            yield repository, section
