"""The job `fetch`: downloads model, tokenizer and rows into the Hub's cache, so that jobs on nodes without network find them.

The commit of each repository is recorded beside the cache (`conf.fetched`). The launcher pins an offline run to these commits.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from conf import fetched
from conf.choices import Init
from conf.datasets import all_sets
from conf.errors import Problem, RunError, first_line
from conf.schema import Config
from conf.schema_model import DataSet
from jobs.data import data_files, hub
from jobs.tensor_io.model_files import find_or_download

log = logging.getLogger(__name__)

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite",
    "*.npz", "*.mlmodel", "*.mlpackage/*", "original/*", "onnx/*",
)  # fmt: skip
"""Files that are not downloaded with the small ones: weights, which many repositories hold in several formats."""


def run(config: Config) -> None:
    """Fill the cache and add to the record. Raises RunError if the Hub refuses, DataError if rows or tokenizer cannot be read."""
    from huggingface_hub.constants import HF_HOME

    commits = {**_models(config), **_rows(config)}
    if not commits:
        log.info("nothing to fetch: the config names no repository of the Hub")
        return
    fetched.add(Path(HF_HOME), commits)
    for name, commit in commits.items():
        log.info(f"fetched   {name} is commit {commit}")
    log.info(f"fetched   into {HF_HOME}; runs with cluster.offline=true use these commits")


def _models(config: Config) -> fetched.Commits:
    """Download the model with its weights, and the tokenizer if it is another repository. Returns their commits."""
    from jobs.tokenization.tokenizer import load_tokenizer  # imports transformers

    commits, model = {}, config.model
    if not Path(model.source).exists():
        commit = _repository("model.source", model.source, model.revision, weights=model.init is Init.pretrained)
        commits[fetched.key("model", model.source, model.revision)] = commit
        config = replace(config, model=replace(model, revision=commit))
    if model.tokenizer and not Path(model.tokenizer).exists():
        commits[fetched.key("model", model.tokenizer, None)] = _repository(
            "model.tokenizer", model.tokenizer, None, weights=False
        )
    if commits:
        load_tokenizer(config)  # raises here, and not on a node without network, if a file is missing
    return commits


def _repository(key: str, name: str, revision: str | None, *, weights: bool) -> str:
    """Download a model's repository. Returns the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # by name first, so that the cache knows what the branch is; everything else by commit: the branch may move meanwhile
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=list(WEIGHTS)))
        if weights and find_or_download(name, folder.name) is None:
            snapshot_download(name, revision=folder.name, allow_patterns=["pytorch_model*.bin*"])
    except (HfHubHTTPError, HFValidationError) as error:
        raise RunError(Problem(key, name, f"the Hub refuses the download: {first_line(error)}")) from error
    return folder.name


def _rows(config: Config) -> fetched.Commits:
    """Download and convert the rows of each set that `datasets` loads from the Hub. Returns their commits."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    commits = {}
    for data_set in _hub_sets(config):
        name = data_set.path.partition(":")[0]
        try:
            commit = str(HfApi().dataset_info(name, revision=data_set.revision).sha)
        except HfHubHTTPError as error:
            raise RunError(Problem("data.path", name, f"the Hub refuses the download: {first_line(error)}")) from error
        rows = len(hub.load(replace(data_set, revision=commit)))
        log.info(f"fetched   {data_set.path}: {rows:,} rows")
        commits[fetched.key("dataset", name, data_set.revision)] = commit
    return commits


def _hub_sets(config: Config) -> Iterator[DataSet]:
    for _, data_set in all_sets(config.data):
        if "://" in data_set.path:
            log.warning(f"{data_set.path} is not fetched: preprocess reads it over the network")
        elif data_files.find_files(data_set) is None and not Path(data_set.path.partition(":")[0]).exists():
            yield data_set
