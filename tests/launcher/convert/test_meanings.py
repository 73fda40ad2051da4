"""What keys of other programs mean in Muster, what settles them, and what is said of files and scripts without a training."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.errors import ConfigError
from jobs.data import formats
from launcher.convert import command, convert, other_files, shell_script
from launcher.convert.keys import Outcome, Row

START = {
    "axolotl": "base_model: a\nmicro_batch_size: 1\nsequence_len: 8\n",
    "llamafactory": "model_name_or_path: a\nstage: sft\ntemplate: x\n",
    "trl": "model_name_or_path: a\ndataset_name: b/c\n",
    "ms-swift": "model: a\ndataset: rows.jsonl\n",
}


def imported(program: str, text: str, folder: Path, gpus: int = 8) -> tuple[list[Row], dict[str, Any]]:
    """(the rows of all inner keys, the experiment) of a small config with this text."""
    config = dict(yaml.safe_load(START[program] + text))
    rows = convert.table(config, program, gpus, folder)
    return [leaf for row in rows for leaf in row.leaves()], convert.experiment(rows)


FIRST = "Below is an instruction that describes a task"
WITH_INPUT = (
    f"{FIRST}, paired with an input that provides further context. Write a response that appropriately completes "
    "the request."
)


@pytest.mark.parametrize(
    ("program", "text", "ours"),
    [
        # defaults of the other program that differ from Muster's
        (
            "axolotl",
            "",
            {"data.overlong": "drop", "train.epochs": 1.0, "train.warmup_ratio": 0.03, "data.validation_fraction": 0},
        ),
        ("axolotl", "sample_packing: true", {"data.pad_to_max": True}),
        ("axolotl", "max_steps: 900", {"train.steps": 900, "train.epochs": None, "train.warmup_steps": 27}),
        (
            "llamafactory",
            "lora_rank: 4",
            {"/adapter": "lora", "adapter.r": 4, "adapter.alpha": 8.0, "train.epochs": 3.0},
        ),
        ("llamafactory", "finetuning_type: full", {"/adapter": "none", "adapter.r": None, "train.global_batch": 64}),
        ("llamafactory", "adapter_name_or_path: out", {"adapter.source": "out", "adapter.r": None}),
        (
            "trl",
            "use_peft: true",
            {"adapter.dropout": 0.05, "adapter.targets": ["q_proj", "v_proj"], "data.mask": "all"},
        ),
        ("trl", "assistant_only_loss: true", {"data.mask": "assistant", "adapter.r": None}),
        ("trl", "completion_only_loss: true", {"data.mask": None}),
        ("trl", "eval_strategy: steps", {"data.validation_path": "b/c:test", "data.validation_fraction": None}),
        ("trl", "dataset_train_split: train_sft", {"data.path": "b/c:train_sft"}),
        ("axolotl", "optimizer: adafactor", {"train.optimizer": "adafactor"}),
        ("ms-swift", "", {"/adapter": "lora", "adapter.r": 8, "train.learning_rate": 1e-4, "train.global_batch": 16}),
        ("ms-swift", "tuner_type: full", {"/adapter": "none", "train.learning_rate": 1e-5, "data.overlong": "drop"}),
        # batches: GPUs that share a row count once
        (
            "axolotl",
            "tensor_parallel_size: 2\ncontext_parallel_size: 2",
            {"train.global_batch": 2, "parallel.tensor_ranks": 2},
        ),
        ("axolotl", "batch_size: 4", {"train.global_batch": 32}),
        ("ms-swift", "sequence_parallel_size: 4\ngradient_accumulation_steps: 3", {"train.global_batch": 6}),
        # layers
        (
            "axolotl",
            "adapter: lora\nlora_target_modules: [q_proj]\nlora_target_parameters: [mlp.experts.down_proj]",
            {"adapter.targets": ["q_proj", "mlp.experts.down_proj"]},
        ),
        (
            "axolotl",
            r"adapter: lora"
            "\n"
            r"lora_target_modules: 'model.language_model.layers.[\d]+.(mlp|self_attn).(down|q|v)_proj'",
            {"adapter.targets": ["q_proj", "v_proj", "down_proj"]},
        ),
        ("ms-swift", r"target_regex: '.*\.self_attn\.(k|v)_proj'", {"adapter.targets": ["k_proj", "v_proj"]}),
        # steps, precision, optimizers
        (
            "axolotl",
            "evals_per_epoch: 0\nsaves_per_epoch: 0",
            {"train.evals_per_epoch": None, "train.saves_per_epoch": None},
        ),
        ("axolotl", "bf16: false\nfp16: false", {"train.precision": "fp32"}),
        ("axolotl", "bf16: false\nfloat16: true", {"train.precision": "fp16"}),
        ("axolotl", "optimizer: adamw_torch_4bit", {"train.optimizer": "adamw_8bit"}),
        ("axolotl", "optimizer: paged_adamw_8bit", {"train.optimizer": "adamw_8bit"}),
        (
            "axolotl",
            "optimizer: paged_adamw_8bit\ndeepspeed: {zero_optimization: {stage: 2}}",
            {"train.optimizer": "paged_adamw_8bit"},
        ),
        (
            "axolotl",
            "lr_scheduler: constant\nwarmup_steps: 5",
            {"train.warmup_steps": None, "train.warmup_ratio": None},
        ),
        (
            "trl",
            "learning_rate: 1e-4\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}",
            {"train.min_lr_ratio": pytest.approx(0.1)},
        ),
        (
            "trl",
            "max_steps: 100\nlr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 20}",
            {"train.decay_ratio": 0.2},
        ),
        ("llamafactory", "save_strategy: best\nval_size: 0.1", {"train.keep_best": True, "train.save_every": 0}),
        ("llamafactory", "ddp_timeout: 180000000", {"cluster.network.nccl_timeout_s": None}),
        ("llamafactory", "neat_packing: true", {"data.packing": True}),
        ("llamafactory", "default_system: Be kind.", {"data.fields": {"system": '{{ "Be kind." }}'}}),
        # attention and layouts
        ("axolotl", "attn_implementation: kernels-community/flash-attn3", {"model.attention": "auto"}),
        ("axolotl", "attn_implementation: flash_attention_2\ncontext_parallel_size: 2", {"model.attention": "auto"}),
        ("axolotl", "dp_shard_size: 2\ndp_replicate_size: 2", {"/parallel": "fsdp", "parallel.shard_ranks": 2}),
        (
            "axolotl",
            "fsdp_config: {sharding_strategy: SHARD_GRAD_OP}",
            {"/parallel": "fsdp", "parallel.reshard_after_forward": False},
        ),
        # data sets
        (
            "axolotl",
            "datasets: [{path: json, data_files: x.jsonl, type: chat_template}]",
            {"data.path": "x.jsonl", "data.files": None},
        ),
        (
            "axolotl",
            "datasets: [{path: a, split: 'train[:5%]', type: chat_template}]",
            {"data.path": "a", "data.split": "[:5%]"},
        ),
        (
            "axolotl",
            "datasets: [{path: a, shards: 4, type: chat_template}]",
            {"data.sets": {"a": {"path": "a", "weight": 0.25}}},
        ),
        ("axolotl", "datasets: [{path: a, type: completion}]", {"data.format": "text", "data.overlong": "split"}),
        (
            "axolotl",
            "datasets: [{path: a, type: {field_instruction: q, field_output: r, format: 'Q: {instruction} A:'}}]",
            {"data.fields": {"prompt": "Q: {{ q }} A:", "completion": "r"}},
        ),
        (
            "axolotl",
            "pretraining_dataset: [{path: a, text_column: body}]",
            {"data.format": "text", "data.packing": True, "data.fields": {"text": "body"}},
        ),
        ("axolotl", "chat_template: qwen3\ndatasets: [{path: a}]", {"data.chat_template": None}),
        (
            "axolotl",
            "datasets: [{path: a}]\nval_set_size: 20",
            {
                "data.validation_path": "a",
                "data.validation_split": "[-20:]",
                "data.split": "[:-20]",
                "data.validation_fraction": None,
            },
        ),
        (
            "ms-swift",
            "env: {NCCL_DEBUG: INFO, CUDA_VISIBLE_DEVICES: '0'}",
            {"cluster.environment": {"NCCL_DEBUG": "INFO"}},
        ),
    ],
)
def test_ours(program: str, text: str, ours: dict[str, Any], tmp_path: Path) -> None:
    rows, found = imported(program, text, tmp_path)
    assert {key: found.get(key) for key in ours} == ours
    assert not [row for row in rows if row.outcome is Outcome.refused]


@pytest.mark.parametrize(
    ("program", "text", "key", "word"),
    [
        (
            "axolotl",
            "adapter: qlora\nload_in_4bit: true\npeft_init_lora_weights: pissa",
            "peft_init_lora_weights",
            "adapter=lora",
        ),
        ("llamafactory", "quantization_bit: 4\npissa_init: true", "pissa_init", "adapter=lora"),
        ("llamafactory", "ray_num_workers: 4", "ray_num_workers", "Slurm starts the ranks"),
        ("llamafactory", "use_ray: true", "use_ray", "Slurm starts the ranks"),
        ("llamafactory", "fp8: true\ndeepspeed: {zero_optimization: {stage: 2}}", "fp8", "parallel=fsdp"),
        ("axolotl", "adapter: lora\nunfrozen_parameters: [lm_head]", "unfrozen_parameters", "adapter.modules_to_save"),
        ("axolotl", "early_stopping_patience: 3", "early_stopping_patience", "data.validation_fraction"),
        ("axolotl", "optimizer: muon\ndeepspeed: {zero_optimization: {stage: 2}}", "optimizer", "parallel=fsdp"),
        ("axolotl", "bnb_config_kwargs: {bnb_4bit_quant_type: fp4}", "bnb_config_kwargs.bnb_4bit_quant_type", "nf4"),
        ("axolotl", "plugins: [axolotl.integrations.spectrum.SpectrumPlugin]", "plugins.0", "train.unfrozen"),
        ("axolotl", "datasets: [{path: a, type: my.type}]", "datasets.0.type", "data.fields"),
        ("axolotl", "relora: true", "relora", "train.optimizer=adamw_8bit"),
        ("axolotl", "rl: grpo", "rl", "pipeline=custom"),
        ("axolotl", "learning_rate: fast", "learning_rate", "is not a number"),
        ("axolotl", "warmup_steps: many", "warmup_steps", "cannot be read"),
        ("trl", "hub_token: hf_abcdefghijklmnopqrstuvwx", "hub_token", "HF_TOKEN"),
    ],
)
def test_refused_with_what_to_do_instead(program: str, text: str, key: str, word: str, tmp_path: Path) -> None:
    rows, _ = imported(program, text, tmp_path)
    [row] = [row for row in rows if row.outcome is Outcome.refused]
    assert row.key == key and word in row.why


ROWS = {
    "alpaca": {"instruction": "Add.", "input": "1 1", "output": "2"},
    "alpaca_chat.load_no_prompt": {"instruction": "Add.", "input": None, "output": "2"},
    "alpaca_w_system.load_open_orca": {"question": "Add.", "response": "2", "system_prompt": "Be kind."},
    "jeopardy": {"question": "Q", "category": "C", "answer": "a dog"},
    "summarizetldr": {"article": "Long.", "summary": "Short."},
}


@pytest.mark.parametrize(
    ("kind", "prompt", "answer"),
    [
        (
            "alpaca",
            f"{WITH_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n",
            "2",
        ),
        ("alpaca_chat.load_no_prompt", "USER: Add.\nASSISTANT:", "2"),
        ("alpaca_w_system.load_open_orca", "### System:\nBe kind.\n### Human:\nAdd.\n### Assistant:\n", "2"),
        (
            "jeopardy",
            f"{WITH_INPUT}\n\n### Instruction:\nQ\n\n### Input:\nC\n\n### Response:\n",
            "what is a dog",
        ),
        ("summarizetldr", "USER: Summarize the following article as a TL;DR.\nLong.\nASSISTANT:", "Short."),
    ],
)
def test_the_prompts_of_axolotl_are_written_as_there(kind: str, prompt: str, answer: str, tmp_path: Path) -> None:
    """Expected texts: the documented prompts of these types."""
    _, ours = imported("axolotl", f"datasets: [{{path: a, type: {kind}}}]", tmp_path)
    sample = formats.convert(ROWS[kind], ours["data.format"], ours["data.fields"])
    assert sample.parts == ((prompt, False), (answer, True))


def test_a_chat_template_in_the_file_gets_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "x.yml").write_text(
        START["axolotl"] + yaml.safe_dump({"chat_template": "jinja", "chat_template_jinja": template})
    )
    assert command.run(tmp_path / "x.yml", None, tmp_path / "out.yaml", None, force=False) == 0
    assert (tmp_path / "out.jinja").read_text() == template
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["data"]["chat_template"] == str(tmp_path / "out.jinja")
    assert "chat_template_jinja" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\nnum_processes: 4",
            "parallel=zero3 with --gpus 4",
        ),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}", "parallel=hsdp"),
        ("zero_optimization: {stage: 2}", "parallel.deepspeed_config="),
        ("provider: x\ngpu: h100\ngpu_count: 8", "cluster=slurm"),
        ("model: a\ntrain_dataset: b\ndist_config: {name: fsdp2}", "v1 format"),
        ("model_name_or_path: a\ntemplate: b\nexport_dir: c", "muster merge"),
        ("model_name_or_path: a\ntemplate: b\ninfer_backend: vllm", "generate.prompts"),
        ("'<|a|>': first\n'<|b|>': second", "data.special_tokens"),
    ],
)
def test_a_file_without_a_training_says_what_it_is(text: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word.replace(".", r"\.")):
        other_files.refuse(yaml.safe_load(text), tmp_path / "x.yaml")


def test_another_kind_of_training_ends_below_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yml").write_text(START["axolotl"] + "rl: dpo\nreward_model: true\nnot_there: 1\n")
    with pytest.raises(ConfigError, match="pipeline=custom") as error:
        command.run(tmp_path / "x.yml", None, tmp_path / "out.yaml", None, force=False)
    assert len(error.value.problems) == 2 and not (tmp_path / "out.yaml").exists()
    assert "not_there" in capsys.readouterr().out


SCRIPTS = [
    (
        "# eight cards\nNPROC_PER_NODE=4 \\\nCUDA_VISIBLE_DEVICES=0,1,2,3 \\\nswift sft \\\n    --model Qwen/Qwen3-8B \\\n"
        "    --dataset 'a.jsonl#5' b.jsonl \\\n    --target_modules q_proj v_proj \\\n    --system 'Be kind.' \\\n"
        "    --deepspeed zero2\n",
        "ms-swift",
        4,
        {
            "model": "Qwen/Qwen3-8B",
            "dataset": ["a.jsonl#5", "b.jsonl"],
            "target_modules": ["q_proj", "v_proj"],
            "system": "Be kind.",
            "deepspeed": "zero2",
        },
    ),
    (
        "nproc_per_node=2\nnnodes=3\n"
        "torchrun --nproc_per_node=$nproc_per_node --nnodes ${nnodes} swift/cli/sft.py --model a --lr_x=-1e-5\n",
        "ms-swift",
        6,
        {"model": "a", "lr_x": "-1e-5"},
    ),
    ("swift sft --model a --dataset b > log.txt 2>&1 &\n", "ms-swift", 1, {"model": "a", "dataset": "b"}),
    (
        "export CUDA_VISIBLE_DEVICES=0,1\nMODEL=a/b\ntrl sft --model_name_or_path $MODEL --use_peft --learning_rate=1e-4 # quick\n",
        "trl",
        2,
        {"model_name_or_path": "a/b", "use_peft": True, "learning_rate": "1e-4"},
    ),
    (
        "accelerate launch --num_processes 8 examples/scripts/sft.py --dataset_name a/b --packing\n",
        "trl",
        8,
        {"dataset_name": "a/b", "packing": True},
    ),
    (
        "llamafactory-cli train x.yaml learning_rate=1e-5 lora_rank=4\n",
        "llamafactory",
        None,
        {"learning_rate": "1e-5", "lora_rank": 4},
    ),
    ("accelerate launch -m axolotl.cli.train x.yaml --learning-rate 3\n", "axolotl", None, {"learning_rate": 3}),
    (
        "ARGS=(\n  --model a # base\n  --dataset 'b c'\n)\nMORE='--lora_rank 4'\nswift sft \"${ARGS[@]}\" $MORE\n",
        "ms-swift",
        1,
        {"model": "a", "dataset": "b c", "lora_rank": 4},
    ),
    ("axolotl train x.yaml --micro-batch-size=2 && echo done\n", "axolotl", None, {"micro_batch_size": 2}),
]


@pytest.mark.parametrize(
    ("text", "program", "gpus", "keys"), SCRIPTS, ids=[f"{case[1]}-{n}" for n, case in enumerate(SCRIPTS)]
)
def test_the_command_of_a_script(
    text: str, program: str, gpus: int | None, keys: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "train.sh").write_text(f"#!/bin/bash\n{text}")
    (tmp_path / "x.yaml").write_text("{}")
    found = shell_script.read(tmp_path / "train.sh")
    assert (found.program, found.gpus, found.keys, found.unread) == (program, gpus, keys, {})
    assert found.config == ("x.yaml" if "x.yaml" in text else None)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("swift rlhf --rlhf_type dpo\n", "swift rlhf"),
        ("echo hello\n", "has no training command"),
        ("swift sft --model a\nswift sft --model b\n", "has 2 trainings"),
        ("swift sft --system 'open\n", "nothing closes"),
    ],
)
def test_a_script_without_one_training_is_refused(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text(text)
    with pytest.raises(ConfigError, match=word):
        shell_script.read(tmp_path / "train.sh")


def test_a_script_is_read_and_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its variables, a config above its folder, the config of accelerate, and words that are no keys."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "zero.yaml").write_text(
        "deepspeed_config: {zero_stage: 3}\ndistributed_type: DEEPSPEED\nnum_processes: 4\n"
    )
    (tmp_path / "base.yaml").write_text("model_name_or_path: a/b\ndataset_name: c/d\nlearning_rate: 1.0e-3\n")
    (tmp_path / "scripts/train.sh").write_text(
        f"touch {tmp_path}/ran\nexport HF_TOKEN=hf_abcdefghijklmnopqrstuvwx NCCL_DEBUG=INFO\n"
        "accelerate launch --config_file zero.yaml trl/scripts/sft.py stray --config base.yaml --learning_rate 1e-4 \\\n"
        "  --run_name run_$(date +%s) --output_dir $NOWHERE/x --weight_decay 0.2\n"
    )
    assert command.run(tmp_path / "scripts/train.sh", None, tmp_path / "out.yaml", None, force=False) == 0
    said, written = capsys.readouterr().out, yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert not (tmp_path / "ran").exists()
    assert "hf_abc" not in said and "cluster.secrets=[HF_TOKEN]" in said and "stray" in said
    assert said.count("comes from the shell") == 2 and written["train"]["weight_decay"] == 0.2
    assert "gpus_per_node=4" in said and "override /parallel: zero3" in (tmp_path / "out.yaml").read_text()
    assert written["train"]["learning_rate"] == 1e-4 and written["train"]["global_batch"] == 32
    assert written["cluster"] == {"environment": {"NCCL_DEBUG": "INFO"}}
