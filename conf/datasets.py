"""Lists the data sets that a config names, each with the values it inherits from `data`. Launcher and jobs both use it."""

from dataclasses import replace

from conf import dataset_info
from conf.schema_model import Data, DataSet


def training(data: Data) -> dict[str, DataSet]:
    """The training sets by name: those of `data.sets`, or the one at `data.path`.

    Raises DataError if a path is LLaMA-Factory's dataset_info.json and its entry cannot be used.
    """
    if data.path is not None:
        only = DataSet(data.path, data.subset, data.revision, data.files, data.split)
        return {data.name: _with_defaults(only, data, "data.path")}
    return {name: _with_defaults(data_set, data, f"data.sets.{name}.path") for name, data_set in data.sets.items()}


def training_by_key(data: Data) -> list[tuple[str, DataSet]]:
    """(config key of its path, set) of each set in `training`."""
    is_one = data.path is not None
    return [("data.path" if is_one else f"data.sets.{name}.path", item) for name, item in training(data).items()]


def training_paths(data: Data) -> list[tuple[str, str]]:
    """(config key, path) of each training set, as given."""
    paths = [(f"data.sets.{name}.path", data_set.path) for name, data_set in data.sets.items()]
    return paths if data.path is None else [("data.path", data.path), *paths]


def held_out(data: Data) -> DataSet | None:
    """The validation set at `data.validation_path`, if there is one.

    If the path names a Hub set or a folder that is also trained on, its subset and revision hold for both; so do its files,
    if both paths name the same split.
    """
    if not data.validation_path:
        return None
    only = DataSet(data.path, data.subset, data.revision, data.files) if data.path is not None else None
    found = DataSet(data.validation_path, split=data.validation_split)
    for trained in [only] if only else data.sets.values():
        if _without_split(trained.path) == _without_split(found.path):
            files = trained.files if trained.path == found.path else []
            found = replace(found, subset=trained.subset, revision=trained.revision, files=files)
            break
    return _with_defaults(found, data, "data.validation_path")


def all_sets(data: Data) -> list[tuple[str, DataSet]]:
    """(config key, set) of each training set and of the validation set."""
    validation = held_out(data)
    return [*training_by_key(data), *([("data.validation_path", validation)] if validation else [])]


def _without_split(path: str) -> str:
    """`owner/name` of `owner/name:test`; an address such as s3://... stays as it is."""
    return path if "://" in path else path.partition(":")[0]


def _with_defaults(data_set: DataSet, data: Data, key: str) -> DataSet:
    """A copy of a set in which format, fields, roles and ignored names that it does not have are those of `data`."""
    filled = replace(
        data_set,
        format=data_set.format or data.format,
        fields=data_set.fields or data.fields,
        roles=data_set.roles or data.roles,
        ignore=data_set.ignore or data.ignore,
    )
    return dataset_info.expand(filled, key)
