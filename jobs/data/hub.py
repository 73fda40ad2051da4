"""Loads data sets of the Hub, and folders whose README.md lists subsets, with the library `datasets`."""

import re
from collections.abc import Iterator
from typing import Any

from conf.errors import DataError, Problem, first_line
from conf.schema_model import DataSet
from jobs.data.arrow_rows import plain_rows
from jobs.data.file_readers import BLOCK_ROWS

NO_SUBSET = re.compile(
    r"Config name is missing|BuilderConfig .* not found|There are multiple .* configurations in the cache"
)


def load(source: DataSet) -> Any:
    """The `datasets.Dataset` of a source; `owner/name:train[:100]` names a split or a part of it.

    Raises DataError with the Hub's reason.
    """
    from datasets import load_dataset, load_dataset_builder
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, _, split = source.path.partition(":")
    split = split or "train"
    files = {split.partition("[")[0]: list(source.files)} if source.files else None
    try:
        if source.revision:
            _check_revision(
                source, load_dataset_builder(name, source.subset, data_files=files, revision=source.revision)
            )
        return load_dataset(name, source.subset, data_files=files, split=split, revision=source.revision)
    except DataError:
        raise
    except Exception as error:  # anything that the Hub's client raises: no network, no such set, a gated set
        if NO_SUBSET.search(str(error)):
            raise DataError(_subset_problem(source, str(error))) from error
        if "Unknown split" in str(error) and (splits := _listed_names(str(error))):
            message = (
                f"has no split {split}: choose one of {', '.join(splits)}, for example data.path={name}:{splits[0]}"
            )
            raise DataError(Problem("data.path", source.path, message)) from error
        offline = " (HF_HUB_OFFLINE is set: fill HF_HOME on a machine with network)" if HF_HUB_OFFLINE else ""
        message = f"no such file, and the Hub answers: {first_line(error)}{offline}"
        raise DataError(Problem("data.path", source.path, message)) from error


def _check_revision(source: DataSet, builder: Any) -> None:
    """Raise DataError if `datasets` would take a copy of another commit: without the Hub it takes its newest copy of a set."""
    is_copy = type(builder).__module__.startswith("datasets.packaged_modules.cache")
    if is_copy and not str(builder.hash).startswith(str(source.revision)):
        message = f"the Hub cannot be asked, and the copy in HF_HOME is of commit {builder.hash}: load this revision into HF_HOME "
        message += f"on a machine with network, or take the copy with data.revision={builder.hash}"
        raise DataError(Problem("data.revision", source.revision, message))


def _listed_names(answer: str) -> list[str]:
    """The names that an error's text lists: as a Python list, or behind a colon at its end."""
    if listed := re.search(r"\[(.*?)\]", answer, re.DOTALL):
        return re.findall(r"'([^']*)'", listed[1])
    listed = re.search(r"in the cache: ([\w., -]+)$", answer, re.MULTILINE)
    return listed[1].split(", ") if listed else []


def _subset_problem(source: DataSet, answer: str) -> Problem:
    """The problem to report if the subset is missing or wrong."""
    names = _listed_names(answer)
    if not names:
        return Problem("data.subset", source.subset or "null", f"{source.path}: {' '.join(answer.split())}")
    message = f"{source.path} has the subsets {', '.join(names)}: choose one, for example data.subset={names[0]}"
    return Problem("data.subset", source.subset or "null", message)


def batches(dataset: Any, path: str) -> Iterator[list[Any]]:
    """The rows of a loaded set, up to BLOCK_ROWS at a time. Pictures and sound stay bytes: only text is trained on."""
    for table in dataset.with_format("arrow").iter(BLOCK_ROWS):
        yield list(plain_rows(table, path))
