"""Rules for keys of Axolotl that Muster does not have, or does not need: what to do instead, or why nothing."""

from collections.abc import Mapping
from typing import Any

from launcher.convert.common_rules import NO_EFFECT
from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, ends, refused, section, unneeded

OTHER_PROGRAM = (
    "Muster fine-tunes on texts. Run it as it is under Slurm: pipeline=custom custom.command=... (docs/own-trainer.md)"
)
OF_MUSTER = unneeded("Muster sets it")
KERNEL = unneeded("is a kernel; Muster has its own, with the same result")
TEXT_ONLY = refused("Muster trains on text only; rows with pictures or sound are refused")
PREFERENCES = refused(OTHER_PROGRAM)
IN_CONFIG_JSON = refused("write it into config.json of the model")
TRACKER = refused("Muster has tracker=wandb, tensorboard, mlflow and comet")
SLURM = refused("Slurm starts the ranks")
STREAMED = refused("Muster tokenizes all rows before training, in a job without GPUs. Leave it away")
SAMPLES = refused("use pipeline=evaluate with generate.prompts, which writes answers to prompts")
LOSS = refused("Muster minimizes the cross entropy; train.label_smoothing changes it")
PLUGINS = {
    "liger": "Muster has a fused loss and compiles blocks",
    "cut_cross_entropy": "Muster has a fused loss",
    "kernels": "Muster has kernels of its own",
}
OTHER_PLUGINS = {
    "spectrum": "name the weights that are trained in train.unfrozen",
    "swanlab": "Muster has tracker=wandb, tensorboard, mlflow and comet",
    "lm_eval": "give RUN/model to lm-evaluation-harness",
    "expert_parallel": "Muster shards experts with parallel=fsdp",
    "llm_compressor": "Muster trains dense weights, or adapters on a quantized base",
    "mora": "Muster has adapter=lora, qlora, dora and rslora",
    "grokfast": "Muster does not filter gradients",
    "densemixer": "Muster uses the router of the model",
}


@described("not needed: liger, cut_cross_entropy and kernels; others are refused")
def plugins(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    names = value if isinstance(value, list) else [value]
    parts = [_plugin(f"{key}.{number}", str(name)) for number, name in enumerate(names)]
    outcome = Outcome.refused if any(part.outcome is Outcome.refused for part in parts) else Outcome.unneeded
    return Row(key, value, outcome, why="; ".join(dict.fromkeys(part.why for part in parts)), parts=tuple(parts))


def _plugin(key: str, name: str) -> Row:
    module = next((word for word in name.split(".") if word in PLUGINS or word in OTHER_PLUGINS), None)
    if module in PLUGINS:
        return Row(key, name, Outcome.unneeded, why=PLUGINS[module])
    return Row(key, name, Outcome.refused, why=OTHER_PLUGINS.get(module or "", f"unknown plugin. {OTHER_PROGRAM}"))


BNB = section(
    {
        "load_in_4bit": NO_EFFECT,
        "load_in_8bit": NO_EFFECT,
        "bnb_4bit_quant_type": choice({"nf4": {}}, "Muster stores 4 bits as nf4"),
        "bnb_4bit_use_double_quant": choice({"true": {}}, "Muster always quantizes the scales of nf4 too"),
        "bnb_4bit_compute_dtype": unneeded("train.precision is that of compute"),
        "bnb_4bit_quant_storage": unneeded("Muster chooses how 4 bits are stored"),
        "llm_int8_*": refused("Muster's int8 has one scale for each row, without outliers apart"),
    },
    "not needed: Muster's own nf4",
)
QUANTIZED_MODEL = section(
    {
        "dequantize": choice(
            {"true": {}}, "the weights are dequantized when they are loaded; adapter=qlora quantizes them"
        ),
        "*": unneeded("Muster reads the quantized weights of the model as they are stored"),
    },
    "not needed: Muster reads the quantized weights of the model as they are stored",
)
PEFT = section(
    {"loftq_config": refused("begins a quantized base elsewhere. Use adapter=qlora as it is")},
    "refused: use adapter=qlora",
)


@described("`parallel=hsdp` with `parallel.shard_ranks`")
def copies(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """`dp_replicate_size`: copies of the model, each sharded over `dp_shard_size` GPUs."""
    shard = int(config.get("dp_shard_size") or 1)
    if int(value) <= 1:
        return Row(key, value, Outcome.unneeded, why="asks for nothing")
    if shard <= 1:
        return Row(key, value, Outcome.kept, {"/parallel": "ddp"})
    return Row(key, value, Outcome.kept, {"/parallel": "fsdp", "parallel.shard_ranks": shard})


@described("`parallel.shard_ranks`, with `parallel=fsdp`")
def shards(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if int(value) <= 1:
        return Row(key, value, Outcome.unneeded, why="asks for nothing")
    if int(config.get("dp_replicate_size") or 1) <= 1:
        return Row(key, value, Outcome.kept, {"/parallel": "fsdp"}, "all ranks share one copy")
    return Row(key, value, Outcome.kept, {"/parallel": "fsdp", "parallel.shard_ranks": int(value)})


@described("`parallel.tensor_ranks`, with `parallel=fsdp`")
def tensor_ranks(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if int(value) <= 1:
        return Row(key, value, Outcome.unneeded, why="asks for nothing")
    return Row(key, value, Outcome.kept, {"parallel.tensor_ranks": int(value)})


RULES: dict[str, Rule] = {
    **dict.fromkeys(("rl", "reward_model", "process_reward_model"), ends(OTHER_PROGRAM)),
    **dict.fromkeys(("ebft", "diffusion", "nemo_gym_*", "kd_trainer", "hatchery"), ends(OTHER_PROGRAM)),
    **dict.fromkeys(
        ("trl", "vllm", "dpo_*", "kto_*", "orpo_*", "cpo_*", "simpo_*", "rpo_*", "rl_beta", "kd_*", "precompute_ref_log_probs",
         "center_rewards_coefficient", "num_labels", "max_prompt_len"),
        PREFERENCES,
    ),
    "plugins": plugins,
    "bnb_config_kwargs": BNB,
    "peft": PEFT,
    "model_quantization_config": unneeded("Muster reads the quantized weights of the model as they are stored"),
    "model_quantization_config_kwargs": QUANTIZED_MODEL,
    "dp_replicate_size": copies,
    "dp_shard_size": shards,
    "tensor_parallel_size": tensor_ranks,
    **dict.fromkeys(
        ("processor_type", "processor_kwargs", "image_size", "image_resize_algorithm", "role_boundaries", "skip_prepare_dataset"),
        TEXT_ONLY,
    ),
    "freeze_mm_modules": unneeded("only the text model is trained; towers stay as they are"),
    **dict.fromkeys(
        ("use_kernels", "use_scattermoe", "use_sonicmoe", "experts_implementation", "expert_backend", "moe_*", "use_dsv4_kernels",
         "dsv4_*", "use_glm_dsa_kernels", "gemma4_*", "fused_attn_kernel", "lora_embedding_kernel", "chunked_cross_entropy*",
         "tiled_mlp*", "flex_attn_compile_kwargs", "flash_optimum", "sdpa_varlen", "large_head_attention", "flash_attn_d512",
         "gptq_disable_exllama", "torch_compile_options", "deepcompile", "llama4_linearized_experts", "heads_k_stride",
         "ring_attn_func", "batch_flattening", "pretrain_multipack_attn", "nonexpert_quantization"),
        KERNEL,
    ),
    "quantize_moe_experts": refused("fused experts stay in the precision of compute (docs/adapters.md)"),
    "expert_parallel_size": refused("Muster shards experts with parallel=fsdp"),
    "expert_parallel_*": refused("Muster shards experts with parallel=fsdp"),
    "layer_offloading": refused("use parallel=fsdp_offload, or train.activation_checkpointing=offload"),
    "selective_checkpointing": changed("train.activation_checkpointing", "keeps attention and every second matrix product",
                                       make=lambda value: "selective" if value else "none"),
    "fp8": changed("train.float8", "8-bit products under parallel=fsdp", make=lambda value: "tensorwise" if value else "none"),
    "fp8_enable_fsdp_float8_all_gather": unneeded("train.float8=tensorwise gathers in 8 bits too"),
    "float32": choice({"true": {"train.precision": "fp32"}, "false": {}}, "is true or false"),
    "fp32_norms": unneeded("Muster keeps fp32 master weights"),
    "fp32_norm_classes": unneeded("Muster keeps fp32 master weights"),
    **dict.fromkeys(("qat", "quantization", "llmcompressor", "nvfp4_*", "use_onebitllms"),
                    refused("Muster trains dense weights, or adapters on a quantized base")),
    "full_finetune": unneeded("adapter=none says it"),
    **dict.fromkeys(
        ("lisa_*", "relora*", "jagged_*", "qgalore_*", "dion_*", "use_galore", "lr_groups"),
        refused("use train.optimizer=adamw_8bit or an adapter"),
    ),
    "torchdistx_path": unneeded("names a library that nothing uses any more"),
    "adam_epsilon2": refused("belongs to CAME. Muster has train.eps"),
    "adam_beta3": refused("belongs to CAME. Muster has train.beta1 and beta2"),
    "lr_quadratic_warmup": refused("Muster's warmup is linear: train.warmup_steps"),
    "cosine_constant_lr_ratio": refused("Muster has train.lr_schedule=wsd with train.decay_ratio"),
    "lr_div_factor": refused("Muster's warmup begins at 1/warmup_steps of the peak"),
    "embedding_lr_scale": refused("write the rate itself: train.learning_rates={embed_tokens: RATE}"),
    **dict.fromkeys(("use_eaft", "eaft_*", "scaling_softmax*", "sage_attention", "use_pose", "pose_*"), LOSS),
    **dict.fromkeys(("streaming", "streaming_*", "pretrain_multipack_buffer_size", "preprocess_iterable"), STREAMED),
    "pretraining_sample_concatenation": unneeded("data.packing joins samples, and keeps their attention apart"),
    "min_sample_len": refused("drop short rows from the data"),
    "sample_packing_sequentially": refused("Muster packs rows so that they fill: data.order decides their order"),
    **dict.fromkeys(("generate_samples", "generation_*", "num_generation_samples", "eval_table_size"), SAMPLES),
    **dict.fromkeys(("do_causal_lm_eval", "eval_causal_lm_metrics", "do_bench_eval", "bench_*", "lm_eval_*"),
                    refused("the held-out loss is the only metric. Give RUN/model to lm-evaluation-harness")),
    **dict.fromkeys(("use_swanlab", "swanlab_*", "use_trackio", "trackio_*", "use_otel_metrics", "otel_*"), TRACKER),
    **dict.fromkeys(("use_ray", "ray_*", "resources_per_worker"), SLURM),
    **dict.fromkeys(("overrides_of_model_config", "model_config", "overrides_of_model_kwargs", "rope_scaling", "cls_model_config"),
                    IN_CONFIG_JSON),
    "reinit_weights": refused("use model.init=random with model.architecture"),
    "added_tokens_overrides": refused("write them into the tokenizer's files; data.special_tokens adds new ones"),
    "peft_layer_replication": refused("repeat the layers in the model itself"),
    "peft_trainable_token_indices": refused("train the whole embedding: adapter.modules_to_save=[embed_tokens]"),
    "trainer_cls": PREFERENCES,
    "dataset_shard_num": refused("take a part of the rows: data.split='[:50%]'"),
    "dataset_shard_idx": refused("take a part of the rows: data.split='[:50%]'"),
    "tokenizer_use_mistral_common": refused("Muster reads tokenizer.json. Give a folder that has it as model.tokenizer"),
    "base_model_ignore_patterns": unneeded("Muster reads safetensors, else the other files"),
    "max_packed_sequence_len": refused("is no longer read by Axolotl: set sequence_len and sample_packing"),
    "adam_eps": refused("is no key of Axolotl. If adam_epsilon is meant: train.eps"),
    "eta_min": refused("is no key of Axolotl. If cosine_min_lr_ratio is meant: train.min_lr_ratio, a share of the peak"),
    "torch_dtype": refused("is no key of Axolotl. train.precision is that of compute"),
    "context_parapllel_size": refused("is no key of Axolotl. If context_parallel_size is meant: parallel.context_ranks"),
    "test_value": NO_EFFECT,
    "hf_use_auth_token": unneeded("the token comes from HF_TOKEN or `hf auth login`"),
    "push_dataset_to_hub": unneeded("Muster keeps tokens in data.cache"),
    "fix_untrained_tokens": unneeded("new rows of the embedding begin at the mean of the others"),
    "mean_resizing_embeddings": unneeded("new rows of the embedding begin at the mean of the others"),
    "dynamic_checkpoint": unneeded("a job saves when it is asked to stop"),
    "save_first_step": unneeded("the first save is at train.save_every"),
    "include_tkps": unneeded("metrics.jsonl has the tokens of each step"),
    "gradient_checkpointing_*": OF_MUSTER,
    **dict.fromkeys(
        ("shrink_embeddings", "embeddings_skip_upcast", "num_dataset_shards_to_save", "accelerator_config", "device", "device_map",
         "world_size", "ddp", "gc_steps", "torch_empty_cache_steps", "gc_collect_steps", "sample_packing_mp_start_method",
         "pad_to_multiple_of", "max_memory", "gpu_memory_limit", "low_cpu_mem_usage", "is_preprocess", "total_num_tokens",
         "total_supervised_tokens", "axolotl_config_path", "is_*_derived_model", "experimental_skip_move_to_device",
         "tokenizer_save_jinja_files", "fsdp_final_state_dict_type", "profiler_steps_start", "merge_lora", "merge_method",
         "qlora_sharded_model_loading", "peft_autocast_adapter_dtype", "peft_ensure_weight_tying", "hf_mlflow_log_artifacts",
         "gptq_*", "gradio_*", "remove_unused_columns", "activation_checkpointing_*"),
        NO_EFFECT,
    ),
}  # fmt: skip
