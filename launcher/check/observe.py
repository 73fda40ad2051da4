"""Looks at what the checks need to know about this machine: files, GPUs, commands and the run folder.

It only reports: `launcher.check.rules` decides what is wrong.
"""

import glob
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf import packages, resolve
from conf.choices import Executor, Init
from conf.data_endings import COMPRESSIONS, ENDINGS
from conf.dataset_info import FILE_NAME
from conf.datasets import all_sets, training_by_key
from conf.errors import Problem, SiteError
from conf.schema import Config
from conf.text import texts
from launcher import secrets_file
from launcher.check import first_row, hub_access, hub_files, inputs, layer_names, model_files, packing_rules
from launcher.check.first_row import FirstRow
from launcher.check.hub_access import HubFacts
from launcher.check.hub_files import HubHome
from launcher.check.inputs import Inputs
from launcher.check.layer_names import LayerNames
from launcher.check.local_gpus import local_gpus
from launcher.check.model_files import Families, ModelFiles
from launcher.estimate.config_json import text_fields
from launcher.estimate.family_defaults import DEFAULTS
from launcher.secret_names import known_values

DATA_SUFFIXES = {*ENDINGS, *COMPRESSIONS}
SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol")


@dataclass(frozen=True)
class Facts:
    """What was seen on the machine where launch.py runs."""

    typed: frozenset[str] = frozenset()
    """Keys that the command line sets."""
    gpus: int = 0
    """GPUs of this machine, at most as many as CUDA_VISIBLE_DEVICES or AMD's variables name."""
    slurm_missing: tuple[str, ...] = ()
    """Slurm commands that are not on PATH."""
    files_missing: tuple[tuple[str, str], ...] = ()
    """(key, value) of each path in the config that does not exist."""
    first_rows: tuple[FirstRow, ...] = ()
    """One for each training set, in the order of `conf.datasets.training`."""
    model: ModelFiles | None = None
    """What lies in the folder of `model.source`, if it is on this machine."""
    families: Families | None = None
    """What the installed transformers can build; None if jobs use another one, or if it does not matter."""
    layers: LayerNames | None = None
    """Names of the model's layers; None if jobs use another transformers, or if they are not known."""
    inputs: Inputs = field(default_factory=Inputs)
    """What was seen of the files that jobs will read."""
    packages_missing: tuple[Problem, ...] = ()
    """Packages that the config needs, if jobs use this interpreter and it lacks them."""
    kernels: frozenset[str] | None = None
    """Packages with kernels for packed rows that jobs can import; None if jobs use another Python."""
    existing: Config | None = None
    """The config stored in `run_dir`, if there is a run."""
    run_dir_error: str | None = None
    """Why `run_dir` cannot be used, and what to do."""
    hub: HubFacts = HubFacts()
    """What the Hub answers about its repositories that the config names."""
    secrets_missing: tuple[str, ...] = ()
    """Names in `cluster.secrets` that are neither in the environment nor in `cluster.secrets_file`."""
    secrets_file_problems: tuple[Problem, ...] = ()
    """Why `cluster.secrets_file` cannot be used."""
    secrets_in_config: tuple[tuple[str, str], ...] = ()
    """(key, which secret) of each value that holds a secret of the environment or of `cluster.secrets_file`."""


def observe(config: Config, typed: Iterable[str] = ()) -> Facts:
    """Look at everything that the checks ask about. `typed`: the keys of the command line.

    `launcher.check.localize` must have run: paths must be absolute.
    """
    try:
        existing, run_dir_error = _run_dir(Path(config.run_dir))
    except OSError as error:
        existing, run_dir_error = None, f"cannot be used: {error.strerror}. Choose another run_dir"
    model = _model(config)
    in_file, file_problems = _secrets_file(config)
    return Facts(
        typed=frozenset(typed),
        gpus=local_gpus(),
        slurm_missing=tuple(name for name in SLURM_COMMANDS if shutil.which(name) is None),
        files_missing=tuple(_missing_files(config)),
        first_rows=tuple(first_row.read(key, Path(item.path)) for key, item in training_by_key(config.data)),
        model=model,
        families=_families(config, model),
        layers=_layers(config, model),
        inputs=inputs.look(config, hub_cache(config)),
        packages_missing=_missing_packages(config),
        kernels=_kernels(config),
        existing=existing,
        run_dir_error=run_dir_error,
        hub=_hub(config, in_file),
        secrets_missing=tuple(
            name for name in config.cluster.secrets if name not in os.environ and name not in in_file
        ),
        secrets_file_problems=file_problems,
        secrets_in_config=tuple(_secrets_in_config(config, in_file)),
    )


def hub_home(config: Config) -> Path:
    """HF_HOME of the jobs, as huggingface_hub finds it."""
    home = config.cluster.hf_home or os.environ.get("HF_HOME")
    if not home:
        home = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(os.path.expandvars(home)).expanduser()


def hub_cache(config: Config) -> Path:
    """The Hub's cache, where jobs look for models: as huggingface_hub finds it."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(cache)).expanduser() if cache else hub_home(config) / "hub"


def _hub(config: Config, in_file: dict[str, str]) -> HubFacts:
    """What the Hub answers, or what its cache holds; nothing for a dry run, which may be on a machine that only previews."""
    if config.dry_run or not config.hub.check:
        return HubFacts()
    secrets = {name: in_file[name] for name in secrets_file.names(config) if name in in_file}
    home = HubHome(hub_home(config), hub_cache(config), secrets | os.environ)
    if config.cluster.offline:
        asked = hub_access.push(config, home) if "push" in config.jobs else HubFacts()
        return replace(asked, missing=tuple(hub_files.missing(config, home)), command=tuple(sys.argv))
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return HubFacts()
    return hub_access.look(config, home)


def _model(config: Config) -> ModelFiles | None:
    source, revision, cache = config.model.source, config.model.revision, hub_cache(config)
    if config.model.init is Init.random or (folder := model_files.find(source, revision, cache)) is None:
        return None
    tokenizer = model_files.find(config.model.tokenizer, None, cache) if config.model.tokenizer else folder
    return model_files.read(folder, tokenizer, local=Path(source).exists())


def _families(config: Config, model: ModelFiles | None) -> Families | None:
    fields = (model.fields if model else None) or {}
    is_other = fields.get("model_type") not in (None, *DEFAULTS)
    return model_files.families() if is_other and _jobs_use_this_python(config) else None


def _layers(config: Config, model: ModelFiles | None) -> LayerNames | None:
    family = text_fields((model.fields if model else None) or {}).get("model_type")
    return layer_names.read(config, family) if _jobs_use_this_python(config) else None


def _missing_packages(config: Config) -> tuple[Problem, ...]:
    """A dry run may be on a machine that only previews: it has no torch, or not what is built for GPU nodes."""
    if not _jobs_use_this_python(config) or (config.dry_run and importlib.util.find_spec("torch") is None):
        return ()
    found = packages.missing(config)
    return tuple(item for item in found if not (config.dry_run and item.key.startswith(("model.", "tracker."))))


def _kernels(config: Config) -> frozenset[str] | None:
    if not config.data.packing or not _jobs_use_this_python(config):
        return None
    named = frozenset().union(*packing_rules.LEAKING.values())
    return frozenset(name for name in named if importlib.util.find_spec(name))


def _jobs_use_this_python(config: Config) -> bool:
    return config.cluster.container.image is None and config.cluster.python in (None, sys.executable)


def looks_like_file(value: str) -> bool:
    """Whether a value is a path on this machine: no Hub id (`owner/name`), no address (`s3://...`)."""
    if "://" in value:
        return False
    return value.startswith(("/", ".", "~")) or bool(set(Path(value).suffixes) & DATA_SUFFIXES)


def _missing_files(config: Config) -> Iterator[tuple[str, str]]:
    paths = {
        **{key: data_set.path for key, data_set in all_sets(config.data)},
        "model.source": config.model.source,
        "model.tokenizer": config.model.tokenizer,
        "custom.folder": config.custom.folder,
    }
    if config.custom.command is not None and config.custom.folder:
        scripts = [
            word for word in config.custom.command.split()[:4] if word.endswith((".py", ".sh")) and "$" not in word
        ]
        paths["custom.command"] = os.path.join(config.custom.folder, scripts[0]) if scripts else None
    if "generate" in config.jobs:
        paths["generate.prompts"] = config.generate.prompts
    if config.cluster.executor is Executor.local and (config.cluster.python or "").startswith(("/", ".", "~")):
        paths["cluster.python"] = config.cluster.python
    image = config.cluster.container.image or ""
    if image.endswith((".sif", ".sqsh")) and "$" not in image and "://" not in image:
        paths["cluster.container.image"] = os.path.abspath(image)
    for key, value in paths.items():
        if value and (looks_like_file(value) or key == "generate.prompts") and not path_exists(value):
            yield key, value


def path_exists(value: str) -> bool:
    """Whether a path exists, or at least one path matches a glob pattern. `folder:test` exists if the folder does."""
    path = Path(without_part(value)).expanduser()
    return bool(path.exists() or glob.glob(str(path), recursive=True))


def without_part(value: str) -> str:
    """The folder of `folder:split`, or the file of `dataset_info.json:name`; any other value as it is."""
    match = re.fullmatch(r"(.+):([\w.-]+)(\[.*\])?", value)
    if match is None or Path(value).exists():
        return value
    found = Path(match[1]).expanduser()
    return match[1] if found.is_dir() or found.name == FILE_NAME else value


def _run_dir(folder: Path) -> tuple[Config | None, str | None]:
    """(the config stored in `folder`, why `folder` cannot be used); both None for a folder that can be created."""
    if (folder / "config.yaml").exists():
        return resolve.load(folder / "config.yaml"), None
    # hidden names do not count: a partial folder of a killed launch starts with a dot
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        return None, "already exists and is not a run folder. Choose another run_dir"
    parent = next(item for item in (folder, *folder.parents) if item.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        return None, f"{parent} is not a folder that you can write to. Choose another run_dir"
    return None, None


def _secrets_file(config: Config) -> tuple[dict[str, str], tuple[Problem, ...]]:
    """The secrets in `cluster.secrets_file`, and why it cannot be used. Not read if no job needs a secret."""
    path = Path(config.cluster.secrets_file).expanduser()
    if not secrets_file.names(config):
        return {}, ()
    try:
        text, warning = secrets_file.read(path)
    except SiteError as error:
        return {}, tuple(item for item in error.problems if isinstance(item, Problem))
    values, problems = secrets_file.parse(path, text)
    return values, (*((Problem(secrets_file.KEY, path, warning),) if warning else ()), *problems)


def secrets_of_environment(*names: str) -> dict[str, str]:
    """The variables of this process that hold secrets: those in `names`, and those that look like it."""
    return known_values(os.environ, frozenset(names))


def _secrets_in_config(config: Config, in_file: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Values that came from a variable (`${oc.env:HF_TOKEN}`, `$HF_TOKEN` in the shell) and must stay there."""
    known = secrets_of_environment(*secrets_file.names(config)) | in_file
    for text in texts(config):
        for name, value in known.items():
            if not text.is_name and (
                (value == text.value and len(value) >= 4) or (len(value) >= 8 and value in text.value)
            ):
                yield text.key, f"the value of {name}"
