"""Rules for the YAML files of ms-swift (`swift sft --config`)."""

import re
from collections.abc import Mapping
from math import ceil
from typing import Any

import yaml

from launcher.convert import schedule_keys, trainer_keys
from launcher.convert.axolotl_others import LOSS, OTHER_PROGRAM, SLURM, TRACKER
from launcher.convert.common_rules import (
    NO_EFFECT,
    SOURCE,
    STREAMING,
    adapter_init,
    adapter_source,
    attention,
    flag,
    held_out,
    layer_names,
    saved_modules,
    system_prompt,
    targets,
    template,
    tokens,
)
from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, ends, kept, number, refused, unneeded

MARKERS = {
    "tuner_type",
    "train_type",
    "split_dataset_ratio",
    "target_modules",
    "model",
    "loss_scale",
    "torch_dtype",
    "num_labels",
}
"""Keys by which a file of ms-swift is recognized."""
FIXED: dict[str, Any] = {
    "train.lr_schedule": "cosine",
    "train.beta2": 0.95,
    "train.weight_decay": 0.1,
    "train.activation_checkpointing": "full",
    "data.validation_fraction": 0.0,
    "data.overlong": "drop",
    "/adapter": "lora",
    "adapter.r": 8,
    "adapter.alpha": 32.0,
    "adapter.dropout": 0.05,
    "adapter.targets": ["all-linear"],
}
SMALLEST_BATCH = 16
"""Rows of a step that ms-swift reaches by accumulation where no number is given."""


def defaults(config: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """Defaults of ms-swift that differ from Muster's, under Muster's keys."""
    found = trainer_keys.defaults(config, gpus, micro=1) | FIXED
    full = "full" in {config.get(name) for name in ("tuner_type", "train_type", "sft_type")}
    if not config.get("gradient_accumulation_steps"):
        step = found["train.micro_batch"] * trainer_keys.data_ranks(config, gpus)
        found["train.global_batch"] = step * max(1, ceil(SMALLEST_BATCH / step))
    why = "without a number, ms-swift takes the longest row that the model can have; Muster 2048 tokens. Set data.max_length"
    longest = Row("default: max_length", None, Outcome.changed, why=why)
    return found | {"train.learning_rate": 1e-5 if full else 1e-4, "data.max_length": longest}


def rules(gpus: int) -> dict[str, Rule]:
    """Rules for a training on `gpus` GPUs."""
    tuner = choice(
        {"lora": {"/adapter": "lora"}, "full": {"/adapter": "none"}},
        "Muster has adapter=lora, qlora, dora, rslora and none",
        last=True,
    )
    return {
        **trainer_keys.rules(gpus),
        "gradient_checkpointing_kwargs": trainer_keys.reentrant(by_default=True),
        "model": SOURCE,
        "model_type": unneeded("config.json says it"),
        "model_revision": kept("model.revision"),
        "use_hf": unneeded("Muster reads Hugging Face's Hub"),
        "torch_dtype": unneeded("Muster reads any dtype; train.precision is that of compute"),
        "task_type": choice({"causal_lm": {}}, OTHER_PROGRAM, last=True),
        "tuner_type": tuner,
        "train_type": tuner,
        "sft_type": tuner,
        "adapters": adapter_source,
        "lora_rank": kept("adapter.r"),
        "init_weights": adapter_init,
        "lora_alpha": number("adapter.alpha"),
        "lora_dropout": number("adapter.dropout"),
        "lorap_lr_ratio": kept("adapter.lora_plus_ratio"),
        "use_rslora": flag({"adapter.rslora": True}),
        "use_dora": flag({"adapter.dora": True}),
        "target_modules": TARGETS,
        "target_parameters": TARGETS,
        "modules_to_save": saved_modules,
        "freeze_vit": choice({"true": {}}, "Muster trains the text model only"),
        "freeze_aligner": choice({"true": {}}, "Muster trains the text model only"),
        "freeze_llm": choice({"false": {}}, "Muster trains the text model only"),
        "freeze_parameters": refused("name what is trained in train.unfrozen"),
        "trainable_parameters": kept("train.unfrozen"),
        "quant_method": choice({"bnb": {}}, "Muster has adapter=qlora and qlora8"),
        "quant_bits": choice({"4": {"adapter.base": "nf4"}, "8": {"adapter.base": "int8"}}, "Muster stores a base in 4 or 8 bits"),
        "bnb_4bit_quant_type": choice({"nf4": {}}, "Muster stores 4 bits as nf4"),
        "bnb_4bit_compute_dtype": unneeded("train.precision is that of compute"),
        "bnb_4bit_use_double_quant": choice({"true": {}}, "Muster always quantizes the scales of nf4 too"),
        "dataset": _datasets,
        "val_dataset": _val_dataset,
        "split_dataset_ratio": held_out,
        "dataset_num_proc": kept("data.workers"),
        "dataset_shuffle": flag({}, {"data.order": "file"}),
        "train_dataloader_shuffle": flag({}, {"data.order": "file"}),
        "streaming": STREAMING,
        "strict": unneeded("data.gates says how many bad rows are allowed"),
        "load_from_cache_file": unneeded("token sets are named by their content"),
        "template": template,
        "system": system_prompt,
        "max_length": kept("data.max_length"),
        "truncation_strategy": choice(
            {"delete": {"data.overlong": "drop"}, "right": {"data.overlong": "truncate"}, "split": {"data.overlong": "split"},
             "raise": {"data.overlong": "error"}},
            "Muster has data.overlong=truncate (on the right), split, drop and error",
        ),
        "packing": kept("data.packing"),
        "padding_free": unneeded("data.packing=true does it; the samples of a row are kept apart"),
        "loss_scale": choice(
            {"default": {}, "all": {"data.mask": "all"}, "last_round": {"data.mask": "last"}},
            "a token is trained or not. Use data.mask=assistant, last or all, or mark turns with `train`",
        ),
        "model_author": unneeded("is for the self-cognition rows of ms-swift"),
        "model_name": unneeded("is for the self-cognition rows of ms-swift"),
        "attn_impl": attention,
        "sequence_parallel_size": kept("parallel.context_ranks"),
        "add_version": unneeded("each run has a folder of its own"),
        "create_checkpoint_symlink": unneeded("RUN/checkpoints/latest names the newest"),
        "rlhf_type": ends(OTHER_PROGRAM),
        "new_special_tokens": tokens,
        **OTHERS,
    }  # fmt: skip


@described("`data.fields`")
def _columns(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """Their column -> ours, the other way round than `data.fields`."""
    names = yaml.safe_load(value) if isinstance(value, str) else value
    return Row(
        key, value, Outcome.kept, {"data.fields": {str(ours): str(theirs) for theirs, ours in dict(names).items()}}
    )


@described("`adapter.targets`, the layers that it finds")
def _regex(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    names, why = layer_names(value)
    if names is None:
        return Row(key, value, Outcome.refused, why=why)
    return Row(key, value, Outcome.changed, {"adapter.targets": names}, why or "names of layers")


@described("`train.unfrozen`")
def _trainable(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    return Row(key, value, Outcome.kept, {"train.unfrozen": [str(value)]})


def _path(name: str) -> tuple[dict[str, Any], str | None]:
    """`owner/name:subset/subset#500` and files: (Muster's keys, why it is refused)."""
    source, _, count = name.removeprefix("HF::").removeprefix("hf::").partition("#")
    if source.upper().startswith("MS::"):
        return {}, "is a data set of ModelScope. Download it and give its path"
    source, _, subset = source.partition(":")
    ours: dict[str, Any] = {"path": source}
    if subset and subset != "default":
        if "/" in subset:
            return {}, f"has several subsets ({subset}). Write a set for each"
        ours["subset"] = subset
    if count:
        ours["num_samples"] = int(count)
    return ours, None


@described("`data.path`, or `data.sets`")
def _datasets(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    names = [str(name) for name in (value if isinstance(value, list) else str(value).split())]
    found = [_path(name) for name in names]
    if refusal := next((why for _, why in found if why), None):
        return Row(key, value, Outcome.refused, why=refusal)
    sets = {f"set{number}": ours for number, (ours, _) in enumerate(found)}
    only = sets["set0"]
    if len(sets) == 1 and "num_samples" not in only:
        name = str(only["path"]).rstrip("/").split("/")[-1].split(".")[0]
        ours: dict[str, Any] = {"/data": "jsonl", "data.name": name, **{f"data.{k}": v for k, v in only.items()}}
    else:
        ours = {"/data": "mix", "data.sets": sets}
    if config.get("use_hf") or all(HUB_ID.fullmatch(name) is None for name in names):
        return Row(key, value, Outcome.kept, ours)
    why = "ms-swift reads such a name from ModelScope, Muster from the Hub of Hugging Face, where it may be another"
    return Row(key, value, Outcome.changed, ours, why)


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.txt)(?<!\.parquet)(:[\w/.-]+)?(#\d+)?")
"""`owner/name` without HF::, which is no file."""


@described("`data.validation_path`")
def _val_dataset(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    names = value if isinstance(value, list) else str(value).split()
    if len(names) != 1 or "#" in names[0]:
        return Row(
            key, value, Outcome.refused, why="Muster has one data.validation_path, with data.validation_split='[:500]'"
        )
    return Row(key, value, Outcome.kept, {"data.validation_path": names[0]})


TARGETS = targets("target_modules", "target_parameters")
PER_GPU = refused("belongs to Megatron. Muster has parallel.tensor_ranks, context_ranks and parallel=fsdp")
OTHERS: dict[str, Rule] = {
    "max_epochs": number("train.epochs"),
    "enable_thinking": changed("data.template_kwargs", "for the chat template", make=lambda value: {"enable_thinking": value}),
    "add_non_thinking_prefix": unneeded("the chat template decides it"),
    "early_stop_interval": kept("train.early_stopping.patience"),
    "router_aux_loss_coef": refused("set router_aux_loss_coef and output_router_logits in config.json of the model"),
    "enable_dft_loss": LOSS,
    "enable_channel_loss": refused("RUN/data/preview.html has the tokens of each source; Muster has one loss"),
    "cached_dataset": refused("belongs to ms-swift's own files. Give the rows as dataset; Muster keeps tokens in data.cache"),
    "cached_val_dataset": refused("belongs to ms-swift's own files. Give the rows as val_dataset"),
    "columns": _columns,
    "interleave_prob": refused("use data.sets.NAME.weight"),
    "custom_dataset_info": refused("write path and data.fields of each set into data.sets"),
    "packing_length": kept("data.max_length"),
    "packing_strategy": choice({"binpack": {}}, "Muster packs rows so that they fill: data.order decides their order"),
    "experts_impl": unneeded("Muster has kernels of its own"),
    "optimizer": choice({"muon": {"train.optimizer": "muon"}, "default": {}, "lorap": {}}, schedule_keys.OTHER_OPTIMIZER),
    "tuner_backend": NO_EFFECT,
    "predict_with_generate": refused("use pipeline=evaluate with generate.prompts, which writes answers to prompts"),
    **dict.fromkeys(("eval_dataset*", "eval_limit", "eval_generation_config"), refused("give RUN/model to an evaluation program")),
    "use_logits_to_keep": unneeded("Muster has a fused loss"),
    "acc_strategy": choice({"token": {}}, "Muster's loss is the mean over tokens"),
    "lora_bias": choice({"none": {}}, "Muster's adapters have no bias"),
    "lora_dtype": unneeded("adapters are trained in fp32"),
    "target_regex": _regex,
    "trainable_parameters_regex": _trainable,
    "freeze_parameters_regex": refused("name what is trained in train.unfrozen"),
    "freeze_parameters_ratio": choice({"0": {}, "0.0": {}}, "name what is trained in train.unfrozen"),
    "rope_scaling": refused("write it into config.json of the model"),
    "max_model_len": unneeded("data.max_length is the longest row"),
    "aligner_lr": refused("Muster trains the text model only"),
    "vit_lr": refused("Muster trains the text model only"),
    "val_dataset_shuffle": NO_EFFECT,
    "zero_hpz_partition_size": refused("Muster has no ZeRO++. Use parallel=hsdp to shard inside nodes"),
    "deepspeed_autotp_size": refused("use parallel.tensor_ranks with parallel=fsdp"),
    "use_ray": SLURM,
    "device_groups": SLURM,
    **dict.fromkeys(("galore_*", "use_galore", "lisa_*", "llamapro_*", "boft_*", "vera_*", "adalora_*", "reft_*", "fourier_*",
                     "lora_ga_*", "adapter_act", "adapter_length"),
                    refused("Muster has adapter=lora, qlora, dora and rslora, and train.optimizer=adamw_8bit")),
    **dict.fromkeys(("swanlab_*",), TRACKER),
    **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "megatron_*",
                     "micro_batch_size", "global_batch_size", "recompute_*", "moe_*", "mcore_*", "train_iters"), PER_GPU),
    **dict.fromkeys(("beta", "reward_*", "num_generations", "teacher_*", "ref_*", "rpo_alpha", "loss_type", "max_completion_length",
                     "center_rewards_coefficient", "sft_alpha", "lmbda", "seq_kd", "use_vllm", "log_completions"),
                    refused(OTHER_PROGRAM)),
    "num_labels": refused(OTHER_PROGRAM),
    "problem_type": refused(OTHER_PROGRAM),
    **dict.fromkeys(("max_pixels", "norm_bbox", "vit_gradient_checkpointing*"), unneeded("Muster trains on text only")),
    **dict.fromkeys(
        ("lazy_tokenize", "ddp_backend", "check_model", "model_kwargs", "download_mode", "shuffle_buffer_size", "device_map",
         "max_memory", "load_args", "load_data_args", "ignore_args_error", "use_swift_lora", "packing_num_proc", "padding_side",
         "bnb_4bit_quant_storage", "local_repo_path", "enable_npu_model_patch", "use_flash_ckpt", "eval_use_evalscope",
         "eval_metric", "temperature", "top_p", "top_k", "max_new_tokens", "repetition_penalty", "num_beams", "stop_words",
         "infer_backend", "result_path", "max_batch_size", "merge_lora", "safe_serialization", "max_shard_size", "vllm_*",
         "sglang_*",
         "lmdeploy_*", "stream", "logprobs", "save_safetensors", "ds3_gather_for_generation", "disable_ignore_empty_think",
         "is_binary_loss_scale", "stopping_strategy", "hqq_axis", "save_last_checkpoint", "seed_worker"),
        NO_EFFECT,
    ),
    "template_backend": unneeded("Muster renders Jinja templates"),
    "use_chat_template": choice({"true": {}}, "rows of plain text: data.format=text or prompt_completion"),
    "agent_template": unneeded("the chat template writes the tools"),
    "response_prefix": refused("write it into the rows, or into the chat template"),
    "resume_only_model": refused("go on from its merged model: model.source=FOLDER"),
    "external_plugins": refused("runs code of your own. Use pipeline=custom"),
    "custom_register_path": refused("runs code of your own. Use pipeline=custom"),
    "disable_auto_column_mapping": NO_EFFECT,
    "callbacks": refused("runs code of your own. Use pipeline=custom"),
}  # fmt: skip
"""Keys that fewer files have, are not needed, or are refused."""
