"""The files beside the weights: config, generation config, tokenizer with its chat template, adapter config, model card.

torch and transformers are imported where they are needed: it takes seconds, and a merge of a foreign checkpoint often does without.
"""

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, Problem
from conf.files import read_json, write_json
from conf.schema import Config
from jobs.consolidation.merge import Merge
from jobs.tensor_io.dtypes import Dtype

CARD = "README.md"


def of_run(config: Config) -> Any:
    """The run's model on the meta device: names, shapes and settings."""
    from jobs.model import build

    return build.build_on_meta(config, adapters=False)


def empty(source: str) -> Any:
    """The model of a folder or Hub id on the meta device. Raises ConfigError when it has no config that can be read."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        described = AutoConfig.from_pretrained(source)
        kind: Any = getattr(transformers, (described.architectures or [""])[0], None)
        with torch.device("meta"):
            made = kind._from_config(described) if kind else AutoModelForCausalLM.from_config(described)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("--base", source, f"cannot be loaded: {str(error).splitlines()[0]}")) from error
    try:
        made.generation_config = GenerationConfig.from_pretrained(source)
    except OSError:
        made.generation_config = GenerationConfig.from_model_config(described)
    return made


def write_model(folder: Path, made: Any, merged: Merge) -> None:
    """What from_pretrained needs beside the weights."""
    from transformers import GenerationConfig

    made.config.use_cache = True
    made.config.architectures = [type(made).__name__]
    made.config.dtype = merged.dtype().torch
    if merged.untied:
        made.config.tie_word_embeddings = False
    made.config.save_pretrained(folder)
    if made.can_generate():
        (made.generation_config or GenerationConfig.from_model_config(made.config)).save_pretrained(folder)
    if made.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(made, folder, config=made.config)


def write_tokenizer(folder: Path, config: Config) -> None:

    from jobs.tokenization.tokenizer import load_tokenizer

    load_tokenizer(config).save_pretrained(folder)


BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
"""Files of a tokenizer in a model folder."""


def copy_tokenizer(folder: Path, places: list[Path]) -> None:
    """Of the first place that has one, as it is."""
    for place in places:
        found = [path for pattern in BESIDE for path in place.glob(pattern) if path.is_file()]
        if any(path.name.startswith("tokenizer") for path in found):
            for path in found:
                shutil.copyfile(path, folder / path.name)
            return


def copy_model(folder: Path, base: Path, dtype: Dtype) -> None:
    """config.json of the base, which fits as it is but for the dtype, and its generation config."""
    config = read_json(base / "config.json")
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": dtype.name, "use_cache": True})
    if (base / "generation_config.json").exists():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")


def write_adapter(folder: Path, settings: dict[str, Any], merged: Merge, base: str) -> None:
    """adapter_config.json, as PEFT reads it; the modules by their full names, which fit no others."""
    first = [output for output in merged.outputs if ".lora_A" in output.name]
    modules = [output.name.removeprefix("base_model.model.").partition(".lora_A")[0] for output in first]
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "bias": "none",
            "r": first[0].shape[0] if first else 0,
            "target_modules": sorted(modules),
            **settings,
        },
    )


def write_card(folder: Path, title: str, rows: dict[str, object], base: str | None, library: str) -> None:
    """README.md: what was trained from what. Of folders of this machine only the last name is shown."""
    head = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if base and not Path(base).exists():
        head.append(f"base_model: {base}")
    every = rows | {"merged by": f"Muster {_muster()}"}
    table = "\n".join(f"| {name} | {_shown(value)} |" for name, value in every.items() if value is not None)
    text = "---\n" + "\n".join(head) + f"\n---\n\n# {title}\n\n| | |\n|---|---|\n{table}\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def _shown(value: object) -> str:
    text = str(value)
    return Path(text).name if "/" in text and Path(text).exists() else text.replace("|", "\\|")


def _muster() -> str:
    try:
        return version("muster")
    except PackageNotFoundError:
        return "unknown"
