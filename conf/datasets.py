"""Lists the data sets that a config names, each with the values it inherits from `data`. Launcher and jobs both use it."""

from dataclasses import replace

from conf.schema import Data, DataSet


def training(data: Data) -> dict[str, DataSet]:
    """The training sets by name: those of `data.sets`, or the one at `data.path`."""
    if data.path is not None:
        only = DataSet(data.path, data.subset, data.revision, data.files, data.split)
        return {data.name: _with_defaults(only, data)}
    return {name: _with_defaults(data_set, data) for name, data_set in data.sets.items()}


def training_paths(data: Data) -> list[tuple[str, str]]:
    """(config key, path) of each training set."""
    paths = [(f"data.sets.{name}.path", data_set.path) for name, data_set in data.sets.items()]
    return paths if data.path is None else [("data.path", data.path), *paths]


def held_out(data: Data) -> DataSet | None:
    """The validation set at `data.validation_path`, if there is one."""
    if not data.validation_path:
        return None
    return _with_defaults(DataSet(data.validation_path, split=data.validation_split), data)


def _with_defaults(data_set: DataSet, data: Data) -> DataSet:
    """A copy of a set in which format, fields, roles and ignored names that it does not have are those of `data`."""
    return replace(
        data_set,
        format=data_set.format or data.format,
        fields=data_set.fields or data.fields,
        roles=data_set.roles or data.roles,
        ignore=data_set.ignore or data.ignore,
    )
