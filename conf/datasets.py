"""The sets of rows that a config names, each with what it inherits; both sides of a launch ask for them."""

from conf.schema import Data, DataSet


def training(data: Data) -> dict[str, DataSet]:
    """The training sets by name: those of `data.sets`, or the one at `data.path`."""
    if data.path is not None:
        return {data.name: _inherited(DataSet(data.path, data.split), data)}
    return {name: _inherited(one, data) for name, one in data.sets.items()}


def training_paths(data: Data) -> list[tuple[str, str]]:
    """(key, path) of each training set."""
    named = [(f"data.sets.{name}.path", one.path) for name, one in data.sets.items()]
    return named if data.path is None else [("data.path", data.path), *named]


def held_out(data: Data) -> DataSet | None:
    """The set at `data.validation_path`."""
    return _inherited(DataSet(data.validation_path, data.validation_split), data) if data.validation_path else None


def _inherited(one: DataSet, data: Data) -> DataSet:
    return DataSet(
        path=one.path,
        split=one.split,
        format=one.format or data.format,
        fields=one.fields or data.fields,
        roles=one.roles or data.roles,
        weight=one.weight,
        num_samples=one.num_samples,
    )
