"""Rules for the YAML files of LLaMA-Factory."""

from collections.abc import Mapping
from typing import Any

from launcher.convert import trainer_keys
from launcher.convert.axolotl_others import LOSS, OTHER_PROGRAM, SLURM, TRACKER
from launcher.convert.common_rules import (
    EMBEDDING_RATE,
    EXACT_PISSA,
    FUSED,
    NO_EFFECT,
    SOURCE,
    STREAMING,
    adapter_source,
    attention,
    flag,
    held_out,
    saved_modules,
    system_prompt,
    targets,
    template,
    tokens,
)
from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, ends, kept, number, refused, unneeded

MARKERS = {"stage", "finetuning_type", "dataset", "template", "cutoff_len", "lora_target", "dataset_dir"}
"""Keys by which a file of LLaMA-Factory is recognized."""


def defaults(config: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """Defaults of LLaMA-Factory that differ from Muster's, under Muster's keys."""
    rank = int(config.get("lora_rank") or 8)
    return (
        trainer_keys.defaults(config, gpus, micro=8)
        | {"data.validation_fraction": 0.0, "data.max_length": 2048, "/adapter": "lora", "adapter.r": rank}
        | {"adapter.alpha": 2.0 * rank, "adapter.dropout": 0.0, "adapter.targets": ["all-linear"]}
        | ({"data.packing": True} if config.get("stage") == "pt" else {})
    )


def rules(gpus: int) -> dict[str, Rule]:
    """Rules for a training on `gpus` GPUs."""
    return {
        **trainer_keys.rules(gpus),
        "model_name_or_path": SOURCE,
        "adapter_name_or_path": adapter_source,
        "model_revision": kept("model.revision"),
        "trust_remote_code": kept("model.trust_remote_code"),
        "use_fast_tokenizer": unneeded("Muster uses fast tokenizers"),
        "stage": _stage,
        "finetuning_type": _finetuning_type,
        "freeze_trainable_layers": refused("name the layers in train.unfrozen, for example [layers.30,layers.31]"),
        "freeze_trainable_modules": refused("name the weights in train.unfrozen"),
        "lora_target": targets("lora_target"),
        "lora_rank": kept("adapter.r"),
        "lora_alpha": number("adapter.alpha"),
        "lora_dropout": number("adapter.dropout"),
        "loraplus_lr_ratio": kept("adapter.lora_plus_ratio"),
        "loraplus_lr_embedding": EMBEDDING_RATE,
        "use_rslora": flag({"adapter.rslora": True}),
        "use_dora": flag({"adapter.dora": True}),
        "pissa_init": changed("adapter.init", EXACT_PISSA, make=lambda value: "pissa" if value else "default"),
        "pissa_iter": unneeded(EXACT_PISSA),
        "pissa_convert": unneeded("consolidate.adapter_only=true writes an adapter that PEFT loads on the same base"),
        "additional_target": saved_modules,
        "create_new_adapter": NO_EFFECT,
        "quantization_bit": _bits,
        "quantization_method": choice(
            {"bnb": {}, "bitsandbytes": {}, "bnb_4bit": {}}, "Muster has adapter=qlora and qlora8"
        ),
        "quantization_type": choice({"nf4": {}}, "Muster stores 4 bits as nf4"),
        "double_quantization": _double,
        "quantization_device_map": NO_EFFECT,
        "upcast_layernorm": NO_EFFECT,
        "use_galore": refused("use train.optimizer=adamw_8bit or an adapter"),
        "use_badam": refused("use train.optimizer=adamw_8bit or an adapter"),
        "use_apollo": refused("use train.optimizer=adamw_8bit or an adapter"),
        "use_muon": flag({"train.optimizer": "muon"}),
        "pure_bf16": choice({"true": {"train.precision": "bf16"}, "false": {}}, "is true or false"),
        "bf16": trainer_keys.precision("bf16"),
        "dataset": _datasets,
        "dataset_dir": unneeded("is the folder of dataset_info.json"),
        "eval_dataset": _eval_dataset,
        "template": template,
        "cutoff_len": changed("data.max_length", "a row that is longer loses its end, not a part of each turn"),
        "packing": _packing,
        "neat_packing": flag({"data.packing": True}),
        "train_on_prompt": flag({"data.mask": "all"}),
        "mask_history": flag({"data.mask": "last"}),
        "max_samples": kept("data.max_rows"),
        "eval_num_beams": NO_EFFECT,
        "val_size": held_out,
        "overwrite_cache": unneeded("token sets are named by their content"),
        "preprocessing_num_workers": kept("data.workers"),
        "preprocessing_batch_size": NO_EFFECT,
        "tokenized_path": changed("data.cache", "Muster's own files, in the same folder"),
        "streaming": STREAMING,
        "mix_strategy": choice({"concat": {}}, "use data.sets.NAME.weight"),
        "default_system": system_prompt,
        "enable_thinking": changed("data.template_kwargs", "for the chat template", make=lambda value: {"enable_thinking": value}),
        "flash_attn": attention,
        "rope_scaling": refused("write rope_scaling into config.json of the model"),
        "shift_attn": refused("it changes what attention sees. Use parallel.context_ranks for long rows"),
        "enable_liger_kernel": FUSED,
        "use_unsloth": FUSED,
        "disable_gradient_checkpointing": flag(
            {"train.activation_checkpointing": "none"}, {"train.activation_checkpointing": "full"}
        ),
        "use_reentrant_gc": _reentrant,
        "resize_vocab": unneeded("the embedding gets the rows that the tokenizer needs"),
        "new_special_tokens": tokens,
        "add_tokens": tokens,
        "plot_loss": unneeded("RUN/report.html has the curves"),
        "predict_with_generate": refused("use pipeline=evaluate with generate.prompts, which writes answers to prompts"),
        "compute_accuracy": refused("the held-out loss is the only metric"),
        **dict.fromkeys(("use_swanlab", "swanlab_*"), TRACKER),
        **dict.fromkeys(("use_ray", "ray_*", "resources_per_worker", "placement_strategy"), SLURM),
        "master_addr": unneeded("Muster finds the address on the node: cluster.network"),
        "master_port": unneeded("Muster finds the port on the node: cluster.network"),
        "infer_backend": NO_EFFECT,
        **OTHERS,
        "hf_hub_token": refused("secrets are named, not written: cluster.secrets=[HF_TOKEN]"),
    }  # fmt: skip


@described("`data.format=text` for pt; others are refused")
def _stage(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if value in ("sft", "pt"):
        return Row(key, value, Outcome.kept, {"data.format": "text"} if value == "pt" else {})
    return Row(key, value, Outcome.refused, why=OTHER_PROGRAM, ends=True)


@described("`adapter`; freeze and oft are refused")
def _finetuning_type(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    ours = {"lora": {"/adapter": "lora"}, "full": {"/adapter": "none"}}
    if value in ours:
        return Row(key, value, Outcome.kept, ours[value])
    if value == "freeze":
        why = "name what is trained: adapter=none train.unfrozen=[layers.30,layers.31]. Without it, all weights would be trained"
        return Row(key, value, Outcome.refused, why=why, ends=True)
    return Row(key, value, Outcome.refused, why="Muster has adapter=lora, qlora, dora, rslora and none", ends=True)


@described("not needed: Muster always quantizes the scales of nf4 too")
def _double(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    outcome = Outcome.unneeded if value else Outcome.changed
    return Row(key, value, outcome, why="Muster always quantizes the scales of nf4 too")


@described("`adapter.base`")
def _bits(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    stored = {"4": "nf4", "8": "int8"}.get(str(value))
    if stored is None:
        return Row(key, value, Outcome.refused, why="Muster stores a base in 4 or 8 bits")
    if stored == "int8":
        return Row(
            key, value, Outcome.changed, {"adapter.base": stored}, "one scale for each row, without outliers apart"
        )
    return Row(key, value, Outcome.kept, {"adapter.base": stored})


@described("`data.packing`; samples of a row are kept apart, as with neat_packing")
def _packing(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if value and not config.get("neat_packing"):
        return Row(
            key,
            value,
            Outcome.changed,
            {"data.packing": True},
            "the samples of a row are kept apart, as with neat_packing",
        )
    return Row(key, value, Outcome.kept, {"data.packing": bool(value) or bool(config.get("neat_packing"))})


@described("`train.reentrant_checkpointing`")
def _reentrant(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if not value or config.get("disable_gradient_checkpointing"):
        return Row(key, value, Outcome.unneeded, why="the form that is not reentrant is Muster's own")
    ours = {"train.activation_checkpointing": "full", "train.reentrant_checkpointing": True}
    return Row(key, value, Outcome.kept, ours)


def _names(value: Any) -> list[str]:
    return value if isinstance(value, list) else [name.strip() for name in str(value).split(",") if name.strip()]


@described("`data.path=dataset_info.json data.subset`, or `data.sets`")
def _datasets(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """Names in dataset_info.json, which Muster reads as it is."""
    folder, names = str(config.get("dataset_dir") or "data"), _names(value)
    if folder.startswith(("REMOTE:", "ONLINE")):
        why = "is a list of sets on the Hub. Download it, and set dataset_dir to its folder"
        return Row(key, value, Outcome.refused, why=why)
    info = f"{folder}/dataset_info.json"
    if len(names) == 1:
        ours: dict[str, Any] = {"/data": "jsonl", "data.name": names[0], "data.path": info, "data.subset": names[0]}
    else:
        ours = {"/data": "mix", "data.sets": {name: {"path": info, "subset": name} for name in names}}
    return Row(key, value, Outcome.kept, ours, f"read from {info}")


@described("`data.validation_path`")
def _eval_dataset(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    names = _names(value)
    if len(names) != 1:
        return Row(key, value, Outcome.refused, why="Muster has one data.validation_path. Join the sets into one")
    path = f"{config.get('dataset_dir') or 'data'}/dataset_info.json:{names[0]}"
    return Row(key, value, Outcome.kept, {"data.validation_path": path})


MEMORY = refused("use train.optimizer=adamw_8bit or an adapter")
OTHERS: dict[str, Rule] = {
    **dict.fromkeys(("galore_*", "badam_*", "apollo_*", "use_adam_mini"), MEMORY),
    **dict.fromkeys(("use_dft_loss", "use_asft_loss", "asft_*", "use_eaft_loss", "eaft_*"), LOSS),
    **dict.fromkeys(("pref_*", "dpo_*", "kto_*", "simpo_*", "ppo_*", "ref_model*", "reward_model*", "ld_alpha"),
                    refused(OTHER_PROGRAM)),
    **dict.fromkeys(("image_*", "video_*", "audio_*", "crop_to_patches", "use_audio_in_video", "media_dir"),
                    unneeded("Muster trains on text only")),
    "freeze_vision_tower": choice({"true": {}}, "Muster trains the text model only"),
    "freeze_multi_modal_projector": choice({"true": {}}, "Muster trains the text model only"),
    "freeze_language_model": choice({"false": {}}, "Muster trains the text model only"),
    "freeze_extra_modules": refused("name the weights in train.unfrozen"),
    **dict.fromkeys(("oft_*", "module_dropout"), refused("Muster has adapter=lora, qlora, dora, rslora and none")),
    "use_llama_pro": refused("name the new layers in train.unfrozen"),
    **dict.fromkeys(("use_mca", "use_megatron_bridge", "use_hyper_parallel"), ends(OTHER_PROGRAM)),
    "megatron_bridge_args": refused(OTHER_PROGRAM),
    "hyper_parallel_*": refused(OTHER_PROGRAM),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
         "expert_model_parallel_size", "context_parallel_size", "sequence_parallel", "use_distributed_optimizer", "recompute_*",
         "bias_activation_fusion", "apply_rope_fusion", "overlap_param_gather", "overlap_grad_reduce", "moe_*",
         "mixed_precision", "use_packed_sequences", "export_hf_on_finish", "masked_softmax_fusion", "cross_entropy_loss_fusion",
         "account_for_*", "calculate_per_token_loss", "megatron_*", "extra_config"),
        refused("belongs to Megatron. Muster has parallel.tensor_ranks, context_ranks and parallel=fsdp"),
    ),
    **dict.fromkeys(("use_kt", "kt_*"), refused("is of KTransformers. For experts in host memory: parallel=fsdp_offload")),
    "mixture_of_depths": refused("changes the model. Take a model that has it"),
    "train_from_scratch": refused("use model.init=random with model.architecture"),
    "moe_aux_loss_coef": refused("set router_aux_loss_coef and output_router_logits in config.json of the model"),
    "new_special_tokens_config": refused("write the tokens of that file into data.special_tokens"),
    "init_special_tokens": unneeded("new rows of the embedding begin at the mean of the others"),
    "add_special_tokens": tokens,
    "tool_format": unneeded("the chat template writes the tools"),
    "disable_shuffling": flag({"data.order": "file"}),
    "early_stopping_steps": kept("train.early_stopping.patience"),
    "interleave_probs": refused("use data.sets.NAME.weight"),
    "buffer_size": NO_EFFECT,
    "eval_on_each_dataset": refused("Muster has one held-out loss, over all rows"),
    "preserve_thinking": changed(
        "data.template_kwargs", "if the chat template knows it", make=lambda value: {"preserve_thinking": value}
    ),
    "split_special_tokens": choice({"false": {}}, "special tokens of rows are texts in Muster, except in the chat template"),
    "fp8": changed("train.float8", "8-bit products under parallel=fsdp", make=lambda value: "tensorwise" if value else "none"),
    "fp8_*": unneeded("Muster uses torchao; train.float8=tensorwise gathers in 8 bits too"),
    "enable_torch_profiler": changed("train.profile", "three early steps", make=bool),
    "profiler_*": unneeded("train.profile writes three early steps"),
    "profile_modules": unneeded("train.profile writes three early steps"),
    **dict.fromkeys(
        ("use_v1_kernels", "use_unsloth_gc", "low_cpu_mem_usage", "cache_dir", "offload_folder", "use_kv_cache", "infer_dtype",
         "print_param_status", "upcast_lmhead_output", "compute_dtype", "device_map", "model_max_length", "block_diag_attn",
         "vllm_*", "sglang_*", "data_shared_file_system", "ignore_pad_token_for_loss", "include_effective_tokens_per_second",
         "adapter_folder", "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "repetition_penalty",
         "length_penalty", "skip_special_tokens", "export_*"),
        NO_EFFECT,
    ),
    **dict.fromkeys(("ms_hub_token", "om_hub_token"), refused("Muster reads Hugging Face's Hub")),
}  # fmt: skip
"""Keys that are not needed, or are refused."""
