"""Writes the files beside the weights: config, generation config, tokenizer with its chat template, adapter config, model card.

torch and transformers are imported inside the functions that need them: that takes seconds, and merging a checkpoint of another
program often does not need them.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conf import stored_quantization
from conf.choices import AdapterInit, AdapterKind, Frozen
from conf.errors import ConfigError, Problem, first_line
from conf.files import read_json, write_json
from conf.schema import Config
from conf.schema_training import Adapter
from jobs.consolidation.merge import Merge
from jobs.tensor_io.untrusted import stays_inside

MODEL_CARD = "README.md"


def empty_model_of_run(config: Config) -> Any:
    """The model of a run on the meta device, without adapters: names, shapes and settings."""
    from jobs.model import build

    return build.build_on_meta(config, adapters=False)


def empty_model(source: str) -> Any:
    """The model of a folder or Hub id on the meta device. Raises ConfigError if it has no readable config."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from jobs.model.stored_quantization import remove as remove_quantization

    try:
        # `False`, because without it transformers asks on the terminal whether to run the code of the model
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        remove_quantization(config)
        model_class: Any = getattr(transformers, (config.architectures or [""])[0], None)
        auto_class: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = model_class._from_config(config) if model_class else auto_class.from_config(config)
    except Exception as error:  # config.json may be anybody's, and transformers does not check its types
        raise ConfigError(Problem("--base", source, f"cannot be loaded: {first_line(error)}")) from error
    try:
        model.generation_config = GenerationConfig.from_pretrained(source)
    except OSError:
        model.generation_config = GenerationConfig.from_model_config(config)
    return model


def write_model(folder: Path, model: Any, merge: Merge) -> None:
    """config.json, generation_config.json and remote code: what from_pretrained needs beside the weights."""
    from transformers import GenerationConfig

    model.config.use_cache = True
    model.config.architectures = [type(model).__name__]
    model.config.dtype = merge.main_dtype().torch
    if merge.untied:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    model.config.save_pretrained(folder)
    if model.can_generate():
        (model.generation_config or GenerationConfig.from_model_config(model.config)).save_pretrained(folder)
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=model.config)


def write_tokenizer(folder: Path, config: Config) -> None:
    """The tokenizer files, with the chat template that the model was trained with."""
    from jobs.tokenization.tokenizer import load_tokenizer

    load_tokenizer(config).save_pretrained(folder)


TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
"""Patterns of the files of a tokenizer in a model folder."""


def copy_tokenizer(folder: Path, candidates: list[Path]) -> None:
    """Copy the tokenizer of the first candidate folder that has one."""
    for candidate in candidates:
        paths = [path for pattern in TOKENIZER_FILES for path in candidate.glob(pattern) if path.is_file()]
        paths = [path for path in paths if stays_inside(path, candidate)]  # a link could lead to any file of yours
        if any(path.name.startswith("tokenizer") for path in paths):
            for path in paths:
                shutil.copyfile(path, folder / path.name)
            return


def copy_model(folder: Path, base: Path, merge: Merge) -> None:
    """Copy config.json of the base, with the dtype of the result, and its generation config."""
    config = stored_quantization.without(read_json(base / "config.json"))
    config.pop("torch_dtype", None)
    if merge.untied:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config | {"dtype": merge.main_dtype().name, "use_cache": True})
    if (base / "generation_config.json").exists():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")


def write_adapter(folder: Path, settings: dict[str, Any], merge: Merge, base: str) -> None:
    """adapter_config.json for PEFT. It lists modules by their full names, so that no other module matches."""
    matrices = [output for output in merge.outputs if ".lora_A" in output.name]
    modules = [output.name.removeprefix("base_model.model.").partition(".lora_A")[0] for output in matrices]
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "bias": "none",
            "r": matrices[0].shape[0] if matrices else 0,
            "target_modules": sorted(modules),
            **settings,
        },
    )


def adapter_settings(adapter: Adapter) -> dict[str, Any]:
    """What adapter_config.json says about the adapters of a run."""
    changes_base = adapter.init in (AdapterInit.pissa, AdapterInit.olora)
    return {
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
        "lora_dropout": adapter.dropout,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "init_lora_weights": adapter.init.name if changes_base else True,
    }


def adapter_line(adapter: Adapter) -> str | None:
    """The adapter in one line of the model card."""
    if adapter.kind is AdapterKind.none:
        return None
    kind = "DoRA" if adapter.dora else "LoRA"
    kind = f"rank-stabilized {kind}" if adapter.rslora else kind
    kind += f" ({adapter.init.name})" if adapter.init is not AdapterInit.default else ""
    base = "" if adapter.base is Frozen.full else f", trained on a base in {adapter.base.name}"
    return f"{kind}, r {adapter.r}, alpha {adapter.alpha:g}{base}"


def write_card(folder: Path, title: str, rows: Mapping[str, object], base: str | None, library: str) -> None:
    """README.md: what was trained from what. A path on this machine is shortened to its last part."""
    front_matter = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if base and not Path(base).exists():
        front_matter.append(f"base_model: {base}")
    all_rows = dict(rows) | {"merged by": f"Muster {_muster_version()}"}
    table = "\n".join(f"| {name} | {_shown(value)} |" for name, value in all_rows.items() if value is not None)
    text = "---\n" + "\n".join(front_matter) + f"\n---\n\n# {title}\n\n| | |\n|---|---|\n{table}\n"
    (folder / MODEL_CARD).write_text(text, encoding="utf-8")


def _shown(value: object) -> str:
    text = str(value)
    return Path(text).name if "/" in text and Path(text).exists() else text.replace("|", "\\|")


def _muster_version() -> str:
    try:
        return version("muster")
    except PackageNotFoundError:
        return "unknown"
