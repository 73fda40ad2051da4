"""Pins an offline run to the commits that `pipeline=fetch` has downloaded."""

from pathlib import Path

from conf import fetched, resolve
from conf.schema import Config
from launcher.check.hub_files import hub_name, is_hub_id


def pin(config: Config, home: Path) -> None:
    """Set the revisions of the model and of the training sets to the commits in the record of HF_HOME, in place.

    A run that is launched again keeps its commits: somebody may have fetched newer ones in the meantime.
    """
    commits = fetched.read(home) | _of_run(Path(config.run_dir) / "config.yaml")
    if is_hub_id(config.model.source):
        name = fetched.key("model", config.model.source, config.model.revision)
        config.model.revision = commits.get(name, config.model.revision)
    for item in (config.data, *config.data.sets.values()):
        if item.path and (repository := hub_name(item)):
            name = fetched.key("dataset", repository, item.revision)
            item.revision = commits.get(name, item.revision)


def _of_run(stored: Path) -> fetched.Commits:
    """The commits of a run that is launched again, for revisions that its command does not name."""
    if not stored.exists():
        return {}
    config, found = resolve.load(stored), {}
    if config.model.revision:
        found[fetched.key("model", config.model.source, None)] = config.model.revision
    for item in (config.data, *config.data.sets.values()):
        if item.path and item.revision and (repository := hub_name(item)):
            found[fetched.key("dataset", repository, None)] = item.revision
    return found
