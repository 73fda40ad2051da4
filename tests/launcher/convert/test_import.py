"""`muster import`: configs in the shape of each program's documented ones become experiments that pass the checks."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher.convert import convert, hub_keys, keys, page
from launcher.convert.keys import Outcome, Row
from tests.conftest import ROOT

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.y*ml"))
REFUSED = {
    "axolotl-refused": {"wandb_log_model", "some_new_key", "datasets.0.type", "datasets.0.drop_system_message"},
    "axolotl-two-sets": {"early_stopping_patience"},
    "axolotl-dora": {"lr_scheduler", "s2_attention"},
    "llamafactory-pt": {"use_badam", "streaming", "shift_attn"},
    "llamafactory-dpo": {"stage", "pref_beta", "finetuning_type"},
    "trl-full": {"push_to_hub"},
    "trl-refused": {"loss_type", "model_init_kwargs.rope_theta", "hub_token", "load_best_model_at_end"},
    "ms_swift-refused": {"tuner_type", "rlhf_type", "dataset", "loss_scale", "streaming"},
}  # fmt: skip
"""The refused keys of each config; none in the others."""


def imported(path: Path, gpus: int = 8):
    config = convert.read(path)
    program = convert.program_of(config, path)
    found = convert.table(config, program, gpus, path.parent)
    return config, program, found, convert.experiment(found)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_key_is_dropped(path: Path) -> None:
    config, program, found, _ = imported(path)
    assert program == path.stem.split("-")[0].replace("_", "-")
    named = Counter(row.key for row in found)
    assert set(config) <= set(named) and max(named.values()) == 1
    leaves = [leaf for row in found for leaf in row.leaves()]
    assert {leaf.key for leaf in leaves if leaf.outcome is Outcome.refused} == REFUSED.get(path.stem, set())
    assert all(leaf.why for leaf in leaves if leaf.outcome is not Outcome.kept)
    assert all(any(f"{leaf.key}.".startswith(f"{key}.") for leaf in [*leaves, *found]) for key in inner_keys(config))


def inner_keys(value: object, name: str = "") -> Iterator[str]:
    """The dotted key of each value in a config that is no section and no list of sections."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inside = [(f"{name}.{key}".strip("."), item) for key, item in items]
    if not inside or (isinstance(value, list) and not any(isinstance(item, dict) for _, item in inside)):
        yield name
        return
    for key, item in inside:
        yield from inner_keys(item, key)


MAPPED = ("question", "answer", "instruction", "input", "output", "system", "prompt", "completion", "text")
"""Columns that the configs map besides those of chats."""


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if "refused" not in path.stem and path.stem != "llamafactory-dpo"],
    ids=lambda path: path.stem,
)
def test_the_experiment_passes_the_checks(path: Path, tmp_path: Path) -> None:
    """On a cluster: as far as a login node sees, which has neither the model nor the rows of the Hub."""
    _, program, found, ours = imported(path)
    written = tmp_path / f"{path.stem}.yaml"
    written.write_text(convert.text(ours, path, program, found))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "conversations": turns} | dict.fromkeys(MAPPED, "a")
    for name in ("rows.jsonl", "second.jsonl", "held.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "data").mkdir()
    entry = '{"file_name": "../rows.jsonl", "formatting": "sharegpt"}'
    names = ("identity", "alpaca_en_demo", "mine", "held", "wiki_demo", "dpo_en_demo")
    (tmp_path / "data/dataset_info.json").write_text("{" + ", ".join(f'"{name}": {entry}' for name in names) + "}")
    words = ["cluster=slurm", "cluster.train.nodes=1", "dry_run=true", f"run_dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, ROOT / "launch.py", written.name, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{ours.get('train.global_batch', 64)} rows" in done.stdout


def value(name: str, key: str) -> object:
    return imported(next(path for path in CONFIGS if path.stem == name))[3].get(key)


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("axolotl-qlora-zero3", "train.global_batch", 64),
        ("axolotl-qlora-zero3", "/adapter", "qlora"),
        ("axolotl-qlora-zero3", "/parallel", "zero3"),
        ("axolotl-qlora-zero3", "parallel.offload_parameters", True),
        ("axolotl-qlora-zero3", "train.tf32", True),
        ("axolotl-qlora-zero3", "parallel.deepspeed.zero_optimization.stage3_max_live_parameters", 1e9),
        ("axolotl-qlora-zero3", "train.optimizer", "adamw"),  # the state is in host memory
        ("axolotl-qlora-zero3", "train.learning_rate", 2e-4),  # YAML reads it as text
        ("axolotl-qlora-zero3", "train.beta2", 0.999),  # a default of Axolotl
        ("axolotl-full-fsdp", "data.roles", {"human": "user", "user": "user", "gpt": "assistant", "system": "system"}),
        ("axolotl-full-fsdp", "data.fields", {"messages": "conversations", "role": "from", "content": "value"}),
        ("axolotl-full-fsdp", "train.min_lr_ratio", 0.0),
        ("axolotl-two-sets", "/adapter", "qlora8"),
        ("axolotl-two-sets", "train.epochs", None),
        ("axolotl-two-sets", "data.order", "length"),
        ("axolotl-unfrozen", "train.unfrozen", ["^lm_head.weight$", "^model.embed_tokens.weight$", "model.layers.2[0-9]+.mlp"]),
        ("axolotl-chat", "data.path", "owner/tools:train_sft"),
        ("axolotl-chat", "data.order", "file"),
        ("llamafactory-lora", "train.beta2", 0.999),
        ("llamafactory-lora", "train.global_batch", 64),
        ("llamafactory-qlora", "train.saves_per_epoch", 4),
        ("llamafactory-qlora", "adapter.lora_plus_ratio", 16),
        ("llamafactory-full-zero3", "train.min_lr_ratio", 0.1),
        ("trl-full", "train.warmup_ratio", 0.1),
        ("trl-full", "data.validation_path", "trl-lib/Capybara:test"),
        ("trl-defaults", "train.lr_schedule", "linear"),
        ("trl-defaults", "train.learning_rate", 2e-5),
        ("trl-mixture", "train.lr_power", 2.0),
        ("ms_swift-lora", "data.sets", {"set0": {"path": "AI-ModelScope/alpaca-gpt4-data-en", "num_samples": 500},
                                        "set1": {"path": "swift/self-cognition", "num_samples": 500}}),
        ("ms_swift-full", "/parallel", "zero3"),
        ("ms_swift-full", "data.mask", "last"),
        ("ms_swift-qlora", "data.subset", "sub"),
        ("axolotl-two-sets", "tracker.mlflow", True),
        ("axolotl-full-fsdp", "/parallel", "fsdp"),
        ("axolotl-refused", "hub.push", "me/model"),
    ],
)  # fmt: skip
def test_values_of_keys(name: str, key: str, expected: object) -> None:
    assert value(name, key) == expected


@pytest.mark.parametrize(
    ("program", "text", "key", "expected"),
    [
        ("axolotl", "lora_model_dir: ./out", "adapter.source", "./out"),
        ("llamafactory", "adapter_name_or_path: owner/adapter", "adapter.source", "owner/adapter"),
        ("llamafactory", "adapter_name_or_path: a,b", "adapter.source", None),
        ("llamafactory", "adapter_name_or_path: a\ncreate_new_adapter: true", "adapter.source", None),
        ("llamafactory", "additional_target: embed_tokens, lm_head", "adapter.modules_to_save", ["embed_tokens", "lm_head"]),
        ("ms_swift", "adapters: [out/checkpoint-5]", "adapter.source", "out/checkpoint-5"),
        ("ms_swift", "modules_to_save: [lm_head]", "adapter.modules_to_save", ["lm_head"]),
        ("trl", "lora_modules_to_save: [lm_head]", "adapter.modules_to_save", ["lm_head"]),
    ],
)  # fmt: skip
def test_an_older_adapter_and_whole_layers_are_kept(
    tmp_path: Path, program: str, text: str, key: str, expected: object
) -> None:
    stem = "axolotl-qlora-zero3" if program == "axolotl" else f"{program}-lora"
    path = next(path for path in CONFIGS if path.stem == stem)
    (tmp_path / path.name).write_text(f"{path.read_text()}\n{text}\n")
    _, _, rows, ours = imported(tmp_path / path.name)
    assert ours.get(key) == expected
    [row] = [row for row in rows if row.key == text.partition(":")[0]]
    assert row.outcome is (Outcome.kept if expected else Outcome.refused)


@pytest.mark.parametrize(
    ("program", "text", "expected"),
    [
        ("axolotl", "peft_init_lora_weights: pissa_niter_4", "pissa"),
        ("axolotl", "peft_init_lora_weights: true", None),
        ("axolotl", "peft_init_lora_weights: olora", "olora"),
        ("axolotl", "peft_init_lora_weights: eva", None),
        ("llamafactory", "pissa_init: true", "pissa"),
        ("axolotl", "peft_init_lora_weights: pissa_niter_5", "pissa"),
        ("ms_swift", "init_weights: gaussian", "gaussian"),
    ],
)
def test_where_an_adapter_begins_is_kept(tmp_path: Path, program: str, text: str, expected: str | None) -> None:
    stem = "axolotl-qlora-zero3" if program == "axolotl" else f"{program}-lora"
    content = next(path for path in CONFIGS if path.stem == stem).read_text()
    content = content.replace("adapter: qlora", "adapter: lora").replace("load_in_4bit: true", "")
    (tmp_path / f"{stem}.yml").write_text(f"{content}\n{text}\n")
    _, _, rows, ours = imported(tmp_path / f"{stem}.yml")
    assert ours.get("adapter.init") == expected
    [row] = [row for row in rows if row.key == text.partition(":")[0]]
    exact = "pissa" in text
    assert row.outcome is (Outcome.refused if "eva" in text else Outcome.changed if exact else Outcome.kept)
    assert ("exactly" in row.why) == exact


@pytest.mark.parametrize(("text", "expected"), [("3", [3]), ("[0, 1]", [0, 1])])
def test_blocks_with_adapters_are_kept(tmp_path: Path, text: str, expected: list[int]) -> None:
    _, ours = rows_of(tmp_path, f"adapter: lora\npeft_layers_to_transform: {text}")
    assert ours["adapter.layers_to_transform"] == expected


@pytest.mark.parametrize(
    ("text", "outcome", "expected"),
    [
        ("gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: true}", Outcome.kept, True),
        ("gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: false}", Outcome.unneeded, None),
        ("gradient_checkpointing_kwargs: {use_reentrant: true}", Outcome.unneeded, None),
        ("gradient_checkpointing: true\ngradient_checkpointing_kwargs: {debug: true}", Outcome.refused, None),
    ],
)
def test_the_form_of_recomputation_is_kept(tmp_path: Path, text: str, outcome: Outcome, expected: object) -> None:
    rows, ours = rows_of(tmp_path, text)
    assert rows["gradient_checkpointing_kwargs"].outcome is outcome
    assert ours.get("train.reentrant_checkpointing") == expected


@pytest.mark.parametrize(
    ("program", "text", "expected"),
    [
        ("trl", "gradient_checkpointing_kwargs: {use_reentrant: true}", True),
        ("trl", "gradient_checkpointing: false\ngradient_checkpointing_kwargs: {use_reentrant: true}", None),
        ("ms_swift", "gradient_checkpointing_kwargs: {use_reentrant: true}", True),
        ("llamafactory", "use_reentrant_gc: true", True),
        ("llamafactory", "use_reentrant_gc: false", None),
        ("llamafactory", "disable_gradient_checkpointing: true\nuse_reentrant_gc: true", None),
    ],
)
def test_programs_that_recompute_by_default_keep_its_form(
    tmp_path: Path, program: str, text: str, expected: bool | None
) -> None:
    path = next(path for path in CONFIGS if path.stem == f"{program}-lora")
    (tmp_path / path.name).write_text(f"{path.read_text().replace('gradient_checkpointing: true', '')}\n{text}\n")
    *_, ours = imported(tmp_path / path.name)
    assert ours.get("train.reentrant_checkpointing") == expected
    assert expected is None or ours["train.activation_checkpointing"] == "full"


def rows_of(tmp_path: Path, content: str) -> tuple[dict[str, Row], dict[str, object]]:
    (tmp_path / "x.yml").write_text("base_model: a\nmicro_batch_size: 1\nsequence_len: 8\n" + content)
    _, _, rows, ours = imported(tmp_path / "x.yml")
    return {row.key: row for row in rows}, ours


NAMED = [
    ("lr_scheduler: cosine_with_restarts", "train.lr_schedule", "cosine_restarts"),
    ("warmup_ratio: 0.1", "train.warmup_ratio", 0.1),
    ("evals_per_epoch: 4", "train.evals_per_epoch", 4),
    ("saves_per_epoch: 2", "train.saves_per_epoch", 2),
    ("early_stopping_patience: 3\nval_set_size: 0.1", "train.early_stopping.patience", 3),
    ("load_best_model_at_end: true\nval_set_size: 0.1", "consolidate.step", "best"),
    ("pad_to_sequence_len: true", "data.pad_to_max", True),
    ("group_by_length: true", "data.order", "length"),
    ("datasets: [{path: a, roles_to_train: [gpt, user]}]", "data.train_on", ["assistant", "user"]),
    ("datasets: [{path: a, train_on_eos: none}]", "data.train_on_end", "none"),
    ("datasets: [{path: a, train_on_eot: last}]", "data.train_on_end", "last"),
    ("datasets: [{path: a, name: sub}]", "data.subset", "sub"),
    ("datasets: [{path: a, revision: abc}]", "data.revision", "abc"),
    ("datasets: [{path: a, data_files: x.jsonl}]", "data.files", ["x.jsonl"]),
    ("datasets: [{path: a, message_field_training: learn}]", "data.fields", {"train": "learn?"}),
    ("datasets: [{path: a, message_field_training: training}]", "data.fields", None),
    ("datasets: [{path: a, message_property_mappings: {tool_calls: calls}}]", "data.fields", {"tool_calls": "calls?"}),
    ("tokens: [<x>]", "data.special_tokens", ["<x>"]),
    ("special_tokens: {pad_token: <p>}", "data.pad_token", "<p>"),
    ("adapter: lora\nlora_modules_to_save: [lm_head]", "adapter.modules_to_save", ["lm_head"]),
    ("adapter: lora\nlora_model_dir: ./out", "adapter.source", "./out"),
    ("unfrozen_parameters: [lm_head]", "train.unfrozen", ["lm_head"]),
    ("neftune_noise_alpha: 5", "train.neftune_alpha", 5.0),
    ("bf16: auto", "train.precision", "auto"),
    ("tf32: true", "train.tf32", True),
    ("gradient_checkpointing: offload", "train.activation_checkpointing", "offload"),
    ("deepspeed: {zero_optimization: {stage: 3}}", "/parallel", "zero3"),
    ("fsdp_config: {fsdp_offload_params: true}", "/parallel", "fsdp_offload"),
    ("wandb_project: p", "tracker.project", "p"),
    ("wandb_project: p\nwandb_entity: e", "tracker.entity", "e"),
    ("wandb_project: p\nwandb_name: n", "tracker.run_name", "n"),
    ("hub_model_id: me/x", "hub.push", "me/x"),
]
"""What Axolotl's guides to several GPUs, DeepSpeed and clouds name, and Muster's word for it."""


@pytest.mark.parametrize(("text", "key", "expected"), NAMED, ids=[key for _, key, _ in NAMED])
def test_what_the_guides_name_has_our_word(tmp_path: Path, text: str, key: str, expected: object) -> None:
    rows, ours = rows_of(tmp_path, text)
    assert ours.get(key) == expected
    assert not [row for row in rows.values() if row.outcome is Outcome.refused]


@pytest.mark.parametrize(
    ("text", "outcome", "word"),
    [
        ("wandb_run_id: abc", Outcome.unneeded, "one id"),
        ("wandb_watch: gradients", Outcome.refused, "gradient norms are in the metrics"),
        ('wandb_watch: "false"', Outcome.unneeded, "asks for nothing"),
        ("wandb_log_model: end", Outcome.refused, "hub.push=owner/name"),
        ('wandb_log_model: "false"', Outcome.unneeded, "asks for nothing"),
        ("hub_strategy: every_save", Outcome.unneeded, "once"),
        ("resume_from_checkpoint: out/checkpoint-5", Outcome.unneeded, "train.resume_step=N"),
        ("use_ray: true", Outcome.refused, "Slurm starts the ranks"),
        ("datasets: [{path: a, train_on_eos: some}]", Outcome.refused, "data.train_on_end=turn, all, last and none"),
        ("datasets: [{path: a, message_property_mappings: {mood: x}}]", Outcome.refused, "property mood"),
    ],
)
def test_what_the_guides_name_and_muster_does_otherwise(tmp_path: Path, text: str, outcome: Outcome, word: str) -> None:
    [row] = [leaf for row in rows_of(tmp_path, text)[0].values() for leaf in row.leaves() if word in leaf.why]
    assert row.outcome is outcome and row.key.startswith(text.partition(":")[0])


def test_two_trackers_are_both_kept(tmp_path: Path) -> None:
    _, ours = rows_of(tmp_path, "wandb_project: p\nuse_tensorboard: true\nuse_mlflow: true\n")
    assert [ours.get(f"tracker.{name}") for name in ("wandb", "tensorboard", "mlflow", "comet")] == [
        True,
        True,
        True,
        None,
    ]


def test_a_tracker_that_is_disabled_is_refused(tmp_path: Path) -> None:
    rows, _ = rows_of(tmp_path, "wandb_project: p\nwandb_mode: disabled\n")
    assert rows["wandb_mode"].outcome is Outcome.refused and "tracker=none" in rows["wandb_mode"].why


def test_of_two_keys_with_one_meaning_the_last_counts_and_the_other_says_so(tmp_path: Path) -> None:
    rows, ours = rows_of(tmp_path, "adapter: lora\nlora_target_linear: true\nlora_target_modules: [q_proj]\n")
    assert ours["adapter.targets"] == ["all-linear"]
    assert rows["lora_target_modules"].outcome is Outcome.changed
    assert rows["lora_target_modules"].why == "lora_target_linear counts"


def test_settings_of_an_adapter_that_is_not_there_are_not_kept(tmp_path: Path) -> None:
    rows, ours = rows_of(tmp_path, "lora_r: 8\nlora_alpha: 16\n")
    assert rows["lora_r"].outcome is Outcome.unneeded and "adapter.r" not in ours


@pytest.mark.parametrize(
    ("sharding", "layout"),
    [
        ("fsdp: hybrid_shard auto_wrap\nfsdp_config: {fsdp_state_dict_type: FULL_STATE_DICT}", "hsdp"),
        ("fsdp: full_shard\nfsdp_config: {fsdp_offload_params: true}", "fsdp_offload"),
        ("fsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}", "hsdp"),
        ("fsdp_config: {reshard_after_forward: true}", "fsdp"),
    ],
)
def test_the_layout_of_fsdp(sharding: str, layout: str, tmp_path: Path) -> None:
    assert rows_of(tmp_path, sharding)[1]["/parallel"] == layout


def test_steps_between_evaluations_do_not_count_where_epochs_do(tmp_path: Path) -> None:
    rows, ours = rows_of(tmp_path, "eval_strategy: epoch\neval_steps: 50\n")
    assert ours["train.evals_per_epoch"] == 1 and "train.eval_every" not in ours
    assert rows["eval_steps"].why == "eval_strategy is epoch"


def test_a_format_of_ones_own_becomes_a_template() -> None:
    sets = value("axolotl-two-sets", "data.sets")
    assert isinstance(sets, dict)
    assert sets["second"]["fields"] == {"prompt": "[INST] {{ question }} [/INST]", "completion": "answer"}


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )


def test_the_command_writes_an_experiment_and_says_how_to_run_it(tmp_path: Path) -> None:
    path, out = next(path for path in CONFIGS if path.stem == "axolotl-refused"), tmp_path / "mine.yaml"
    done = run("import", path, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "some_new_key" in done.stdout and f"{out} cluster=slurm cluster.train.nodes=1" in done.stdout
    assert re.search(r" [1-9] refused", done.stdout)
    content = out.read_text()
    assert "# not imported: some_new_key" in content
    assert yaml.safe_load(content)["data"]["max_length"] == 512
    assert (
        run("import", path, "--out", out, "--gpus", 4, cwd=tmp_path).returncode == 2
    )  # another content is not overwritten
    assert run("import", path, "--out", out, "--gpus", 4, "--force", cwd=tmp_path).returncode == 0


def test_the_command_shows_escape_sequences(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text('base_model: "a\\e]0;title\\a"\n"other\\e[2J": 1\n')
    done = run("import", tmp_path / "x.yml", "--as", "axolotl", "--out", tmp_path / "out.yaml", cwd=tmp_path)
    assert "\x1b" not in done.stdout + done.stderr
    assert r"a\x1b]0;title\x07" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1\nb: 2", "is not YAML in line 2"),
        ("- 1", "has no keys"),
        ("learning_rate: 1", "Add --as axolotl"),
        ("base_model: a\ndeepspeed: broken.json", "is not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(content)
    (tmp_path / "broken.json").write_text("{")
    done = run("import", tmp_path / "x.yml", "--out", tmp_path / "out.yaml", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "out.yaml").exists()


def test_a_foreign_config_as_an_experiment_is_refused_with_the_command(tmp_path: Path) -> None:
    path = CONFIGS[0]
    done = subprocess.run(
        [sys.executable, ROOT / "launch.py", path], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"muster import {path}" in done.stderr


def test_the_page_has_every_key() -> None:
    assert page.PAGE.read_text() == page.text(), "run python -m launcher.convert.page"


@pytest.mark.parametrize(
    ("content", "outcome", "ours"),
    [
        (
            "push_to_hub: true\nhub_model_id: me/x\nhub_strategy: every_save\nhub_private_repo: false",
            Outcome.changed,
            "me/x",
        ),
        ("push_to_hub: true\nhub_model_id: x", Outcome.refused, None),
        ("push_to_hub: false\nhub_model_id: me/x", Outcome.unneeded, None),
    ],
)
def test_a_trainer_pushes_only_with_its_switch(content: str, outcome: Outcome, ours: str | None) -> None:
    config = dict(yaml.safe_load(content))
    rows = {row.key: row for row in keys.apply(hub_keys.RULES, config)}
    assert (rows["hub_model_id"].outcome, rows["hub_model_id"].ours.get("hub.push")) == (outcome, ours)
    if "hub_private_repo" in rows:
        assert rows["hub_private_repo"].ours == {"hub.private": False}
