"""launcher/check/model_rules.py: what can never train is refused before anything is queued, and every remedy works."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf import resolve
from conf.schema import Config
from conf.schema_training import Adapter
from launcher.check import localize, model_files, observe, parallel_rules, shape_rules
from launcher.check.model_rules import notes, problems
from launcher.estimate import auto_settings, memory
from launcher.estimate.config_json import positions
from launcher.estimate.parameters import count
from tests.conftest import ROOT, Compose, Launch, put
from tests.launcher.check.wrong_configs import NO_TENSORS

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = json.loads((ROOT / "tests/jobs/families.json").read_text())

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
MULTIMODAL = sorted({kind for kind, values in FAMILIES.values() if "text_config" in values})
GPTQ = {"quant_method": "gptq", "bits": 4}


def folder(base: Path, fields: dict[str, Any] | None = None, *names: str, tokens: int = 0, added: int = 0) -> Path:
    """A model folder: a Llama with other `fields`, the named files, and a tokenizer of `tokens` and `added` tokens."""
    base.mkdir(parents=True)
    if fields is not None:
        text = {key: value for key, value in (LLAMA | fields).items() if value != "missing"}
        (base / "config.json").write_text(json.dumps(text))
    for name in names or ("model.safetensors",):
        (base / name).write_text(NO_TENSORS if name.endswith((".safetensors", ".bin")) else '{"weight_map": {}}')
    (base / "tokenizer.model").write_text("")
    if tokens:
        vocabulary = {f"t{number}": number for number in range(tokens)}
        more = [{"id": tokens + number, "content": f"<{number}>"} for number in range(added)]
        text = {"added_tokens": more, "model": {"vocab": vocabulary, "merges": []}}
        (base / "tokenizer.json").write_text(json.dumps(text))
    return base


def launched(compose: Compose, source: Path | str, *words: str) -> Config:
    """The config that launch.py checks for a model folder."""
    config = compose("cluster=local", "model=hub", "model.source=unknown/unknown", *words)
    config.model.source, config.model.architecture = str(source), None
    localize.localize(config, 0)
    return config


def found(config: Config) -> list[str]:
    facts = observe.observe(config)
    return [str(problem) for problem in problems(config, facts.model, facts.families)]


def found_in_shape(config: Config) -> list[str]:
    facts = observe.observe(config)
    return [str(problem) for problem in shape_rules.problems(config, facts.model, facts.families, facts.inputs.tokens)]


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True}
QUANTIZED = [
    (GPTQ, "gptq, 4 bits"),
    ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}},
        "compressed-tensors",
    ),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": FLOAT8}, "b": {"weights": NVFP4}}},
        "compressed-tensors",
    ),
    ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    ({"_load_in_8bit": True}, "bitsandbytes, 8 bits"),
    ({"bits": 3}, "of an unknown kind, 3 bits"),
]


@pytest.mark.parametrize("inside", [False, True], ids=["of the model", "of its text"])
@pytest.mark.parametrize(("section", "named"), QUANTIZED, ids=lambda item: item if isinstance(item, str) else "")
def test_quantized_weights(compose: Compose, tmp_path: Path, section: dict[str, Any], named: str, inside: bool) -> None:
    fields = {"quantization_config": section}
    if inside:
        fields = {"model_type": "gemma3", "vision_config": {}, "text_config": LLAMA | fields}
    [message] = found(launched(compose, folder(tmp_path / "m", fields)))
    assert message.startswith(f"model.source={tmp_path / 'm'}: is stored quantized ({named})"), message
    assert found(launched(compose, folder(tmp_path / "original", {}), "adapter=qlora")) == []  # what the message says


DEQUANTIZED = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, "fp8"),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": FLOAT8}}}, "compressed-tensors"),
]


@pytest.mark.parametrize(("section", "named"), DEQUANTIZED, ids=lambda item: item if isinstance(item, str) else "")
def test_a_base_that_is_dequantized_is_said(
    compose: Compose, tmp_path: Path, section: dict[str, Any], named: str
) -> None:
    base = folder(tmp_path / "m", {"quantization_config": section, "vocab_size": 2**20, "hidden_size": 2**10})
    start = f"base      {base} is stored quantized ({named}): each rank dequantizes the part that it reads to "
    for words, end in (
        ((), "fp32, 8.0 GiB in all"),
        (("adapter=lora", "train.precision=bf16"), "bf16, 4.0 GiB in all"),
        (("adapter=qlora", "train.precision=bf16"), "bf16, 4.0 GiB in all, and then quantized to nf4"),
        (("adapter=lora", "cluster=slurm", "cluster.train.gpus_per_node=8"), "bf16 or fp16, 4.0 GiB in all"),
    ):
        config = launched(compose, base, *words)
        assert found(config) == [] and notes(config, observe.observe(config).model) == [start + end]
        plain = folder(tmp_path / f"plain{len(words)}{end[-3:]}", {"vocab_size": 2**20, "hidden_size": 2**10})
        same = launched(compose, plain, *words)
        assert memory.estimate(config) == memory.estimate(same) and notes(same, observe.observe(same).model) == []


def test_an_embedding_that_grows_is_said(compose: Compose, tmp_path: Path) -> None:
    config = launched(compose, folder(tmp_path / "m", {}, tokens=128, added=3))
    assert found(config) == []
    assert notes(config, observe.observe(config).model) == [
        "base      the embedding grows from 128 to 131 rows, one for each token"
    ]


def test_rows_of_special_tokens_that_stay_frozen_are_said(compose: Compose, tmp_path: Path) -> None:
    base, tokens = folder(tmp_path / "m", {}), 'data.special_tokens=["<|a|>"]'
    [line] = notes(config := launched(compose, base, "adapter=lora", tokens), observe.observe(config).model)
    assert line.startswith("adapter   trains neither embedding nor head, so the rows of <|a|> stay")
    for words in (["adapter=lora", "adapter.modules_to_save=[embed_tokens,lm_head]"], []):
        config = launched(compose, base, tokens, *words)
        assert notes(config, observe.observe(config).model) == []


def test_dora_on_conv1d_layers(compose: Compose, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", {"model_type": "gpt2", "n_positions": 4096})
    start = "adapter.dora=true: adapts linear layers only, but c_attn, c_proj, c_fc of a gpt2 model are Conv1D layers. Use adapter."
    for words in (["adapter=dora"], ["adapter=dora", "adapter.targets=[attn.c_attn]"]):
        [message] = found(launched(compose, base, *words))
        assert message.startswith(start)
        assert found(launched(compose, base, *words, "adapter.dora=false")) == []  # what the message says
    assert found(launched(compose, base, "adapter=lora")) == []
    assert found(launched(compose, base, "adapter=dora", "adapter.targets=[lm_head]")) == []
    assert found(launched(compose, folder(tmp_path / "llama", {}), "adapter=dora")) == []


def test_quantized_weights_of_older_files(compose: Compose, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", {}, "model.safetensors", "quantize_config.json")
    assert "(gptq" in found(launched(compose, base))[0]
    base = folder(tmp_path / "n", {"compression_config": {"quant_method": "compressed-tensors"}})
    assert "(compressed-tensors" in found(launched(compose, base))[0]


REFUSED: list[tuple[dict[str, Any] | None, tuple[str, ...], str]] = [
    ({"model_type": "bert"}, (), "is an encoder (model_type=bert)"),
    ({"model_type": "modernbert"}, (), "is an encoder (model_type=modernbert)"),
    ({"model_type": "t5"}, (), "is an encoder with a decoder (model_type=t5)"),
    ({"model_type": "llama", "is_encoder_decoder": True}, (), "is an encoder with a decoder"),
    ({"model_type": "missing"}, (), "its config.json has no model_type"),
    ({"model_type": "no_such_family"}, (), "has model_type=no_such_family"),
    ({"model_type": "mllama", "vision_config": {}, "text_config": LLAMA}, (), "whose text cannot be trained alone: its decoder"),
    ({"model_type": "blip-2", "text_config": LLAMA}, (), "cannot be trained alone: it reads no text without an image"),
    ({"model_type": "llava", "text_config": {"model_type": "bert"}}, (), "is an encoder (model_type=bert)"),
    ({"model_type": "blip-2", "text_config": {"model_type": "t5"}}, (), "is an encoder with a decoder (model_type=blip-2)"),
    ({"model_type": "gemma3", "vision_config": {}, "text_config": LLAMA}, ("pytorch_model.bin",), "without *.safetensors"),
    ({"model_type": "new", "auto_map": {"AutoConfig": "a.B"}}, (), "Read that code, then add model.trust_remote_code=true"),
    (None, ("model-Q4_K_M.gguf",), "has weights in GGUF only"),
    ({}, ("model-Q4_K_M.gguf",), "has weights in GGUF only"),
    ({}, ("README.md",), "has no weights (*.safetensors or *.bin)"),
    ({}, ("training_args.bin",), "has no weights"),
    (None, ("model.safetensors",), "has no config.json"),
    (None, ("config.yaml", "checkpoints"), "is a run folder. Name its merged model: model.source="),
    (None, ("adapter_config.json", "adapter_model.safetensors"), "is an adapter (PEFT), not a model"),
    ({}, ("adapter_config.json", "adapter_model.safetensors", "model.safetensors"), "holds an adapter (PEFT) beside a model"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "names", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
def test_what_can_never_train(
    compose: Compose, tmp_path: Path, fields: dict[str, Any] | None, names: tuple[str, ...], said: str
) -> None:
    base = folder(tmp_path / "m", fields, *names)
    [message] = found(launched(compose, base))
    assert message.startswith(f"model.source={base}: ") and said in message, message


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ("model.safetensors",)),
        ({}, ("model.safetensors.index.json",)),
        ({}, ("pytorch_model.bin",)),
        ({"model_type": "llama", "auto_map": {"AutoConfig": "a.B"}}, ()),  # transformers has this family itself
        ({"model_type": "bert", "is_decoder": True}, ()),
        ({"model_type": "mamba"}, ()),
        *(({"model_type": family, "vision_config": {}, "text_config": LLAMA}, ()) for family in MULTIMODAL),
        ({"quantization_config": None}, ()),
    ],
)
def test_what_can_train(compose: Compose, tmp_path: Path, fields: dict[str, Any], names: tuple[str, ...]) -> None:
    assert found(launched(compose, folder(tmp_path / "m", fields, *names))) == []


def test_remote_code_that_the_user_trusts(compose: Compose, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", {"model_type": "new", "auto_map": {"AutoConfig": "a.B"}})
    assert found(launched(compose, base, "model.trust_remote_code=true")) == []


def test_an_adapter_names_its_kind_and_its_base(compose: Compose, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", None, "adapter_model.safetensors")
    (base / "adapter_config.json").write_text('{"peft_type": "IA3", "base_model_name_or_path": "owner/base"}')
    assert "is an adapter (IA3) of owner/base, not a model" in found(launched(compose, base))[0]


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_config_that_cannot_be_read(compose: Compose, tmp_path: Path, text: str) -> None:
    base = folder(tmp_path / "m", {})
    (base / "config.json").write_text(text)
    [message] = found(launched(compose, base))
    assert "config.json" in message and "Download the model again" in message


def test_a_gguf_file(compose: Compose, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("x")
    assert "has weights in GGUF only" in found(launched(compose, path))[0]


def test_a_vocabulary_smaller_than_that_of_the_tokenizer(compose: Compose, tmp_path: Path) -> None:
    [message] = found(launched(compose, folder(tmp_path / "m", {"vocab_size": 100}, tokens=128)))
    assert "the vocabulary of the tokenizer has 128 tokens, but the model has only 100 (vocab_size)" in message
    inside = {"model_type": "gemma3", "vision_config": {}, "text_config": LLAMA | {"vocab_size": 100}}
    assert "has 128 tokens" in found(launched(compose, folder(tmp_path / "i", inside, tokens=128)))[0]
    right, own = (
        folder(tmp_path / "a", {"vocab_size": 100}, tokens=100),
        folder(tmp_path / "b", {"vocab_size": 100}, tokens=128),
    )
    assert found(launched(compose, own, f"model.tokenizer={right}")) == []  # what the message says
    assert found(launched(compose, right, f"model.tokenizer={own}"))[0].startswith(f"model.tokenizer={own}: ")


def test_added_tokens_are_new_rows_which_an_adapter_alone_cannot_train(compose: Compose, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", {"vocab_size": 128}, tokens=128, added=2)
    assert found(launched(compose, base)) == []
    [message] = found(launched(compose, base, "adapter=lora"))
    assert "has 130 tokens, but the model has only 128 (vocab_size)" in message and "or use adapter=none" in message
    remedy = "adapter.modules_to_save=[embed_tokens,lm_head]"
    assert f"Set {remedy}" in message and found(launched(compose, base, "adapter=lora", remedy)) == []


def test_a_tokenizer_without_a_token_to_pad_with(compose: Compose, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", {}, tokens=128)
    settings = base / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    [message] = found(launched(compose, base))
    assert message.startswith(f"model.source={base}: its tokenizer names neither") and "Set data.eos_token" in message
    assert found(launched(compose, base, "data.eos_token=t1")) == []  # what the message says
    (base / "special_tokens_map.json").write_text('{"eos_token": "t1"}')
    assert found(launched(compose, base)) == []
    (base / "special_tokens_map.json").unlink()
    settings.write_text('{"tokenizer_class": "LlamaTokenizer"}')  # it has tokens of its own
    assert found(launched(compose, base)) == []


def test_ranks_divide_the_heads_that_config_json_names(compose: Compose, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", {"model_type": "mystery", "num_attention_heads": 6, "num_key_value_heads": 3})
    config = put(launched(compose, base), {"parallel.context_ranks": 4, "parallel.tensor_ranks": 2})
    messages = [str(problem) for problem in parallel_rules.shared_rows_and_matrices(config)]
    assert any("num_attention_heads=6" in message and "Use 1, 2, 3 or 6" in message for message in messages), messages
    assert any("num_key_value_heads=3" in message and "Use 1 or 3" in message for message in messages), messages
    assert not list(
        parallel_rules.shared_rows_and_matrices(put(config, {"parallel.context_ranks": 1, "parallel.tensor_ranks": 1}))
    )


def test_a_run_keeps_the_shape_that_it_was_launched_with(compose: Compose, tmp_path: Path) -> None:
    """Else a second launch would differ from the first, once the Hub's cache has the model."""
    base, run = folder(tmp_path / "m", {}), tmp_path / "run"
    config = launched(compose, base, f"run_dir={run}")
    assert config.model.architecture
    run.mkdir()
    resolve.save(put(config, {"model.architecture": None}), run / "config.yaml")
    assert launched(compose, base, f"run_dir={run}").model.architecture is None
    other = folder(tmp_path / "other", {})
    assert launched(compose, other, f"run_dir={run}").model.architecture


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"model_type": "bamba"}, "model_type=bamba is a family that Muster cannot count"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm=true of model_type=stablelm is not counted"),
        ({"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32}, "this form of OPT"),
        ({"model_type": "gemma4", "text_config": LLAMA, "vision_config": {}}, "model_type=gemma4_text is a family"),
        ({"hidden_size": "64"}, "lacks the usual fields"),
    ],
)
def test_a_model_that_cannot_be_counted_has_a_reason_instead_of_a_number(
    compose: Compose, tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    config = launched(compose, folder(tmp_path / "m", fields))
    put(config, {"cluster.train.gpus_per_node": 2, "cluster.train.gpu_memory_gib": 79.0})
    assert memory.estimate(config) is None
    assert any(
        f"Nothing is estimated, because {why}" in line or why in line for line in auto_settings.choose(config)[1]
    )


def test_a_large_tokenizer_is_read_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder(tmp_path / "m", {}, tokens=300, added=3)
    assert model_files.tokenizer_sizes(base / "tokenizer.json") == (303, 300)
    monkeypatch.setattr(model_files, "SMALL_TOKENIZER", 2000)
    assert model_files.tokenizer_sizes(base / "tokenizer.json") == (303, 300)
    (base / "tokenizer.json").write_text("{" * 3000)
    assert model_files.tokenizer_sizes(base / "tokenizer.json") == (None, None)


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({}, None),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 32768,
          "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 131072, "rope_parameters":
          {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 4096, "rope_parameters": {"full_attention": {"factor": 8.0}, "sliding_attention": {}}}, 32768),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
    ],
)  # fmt: skip
def test_positions_with_rope_scaling(fields: dict[str, Any], longest: int | None) -> None:
    assert positions(fields) == longest


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "n_positions"),
        ("gptj", "n_positions"),
        ("codegen", "n_positions"),
        ("mpt", "max_seq_len"),
        ("opt", None),
    ],
)
def test_rows_longer_than_the_positions_of_a_model(
    compose: Compose, tmp_path: Path, family: str, name: str | None
) -> None:
    fields = {"max_position_embeddings": "missing"} | {name or "max_position_embeddings": 1024}
    base = folder(tmp_path / "m", {"model_type": family, **fields})
    [message] = found_in_shape(launched(compose, base, "data.max_length=2048"))
    assert (
        message.startswith("data.max_length=2048: is more than the 1024 positions")
        and "Use data.max_length=1024" in message
    )
    assert found_in_shape(launched(compose, base, "data.max_length=1024")) == []


def test_rows_longer_than_rotary_positions(compose: Compose, tmp_path: Path) -> None:
    rope = launched(compose, folder(tmp_path / "r", {}), "data.max_length=8192")
    [message] = found_in_shape(rope)
    assert message.startswith("data.max_length=8192: is more than the 4096 positions")
    assert found_in_shape(put(rope, {"data.max_length": 4096})) == []
    packed = put(rope, {"data.packing": True, "data.max_length": 8192})  # its samples may be shorter
    assert found_in_shape(packed) == []
    assert "data.max_length=8192 is more than the 4096 positions" in auto_settings.choose(packed)[1][-1]
    assert auto_settings.choose(put(packed, {"data.max_length": 4096}))[1] == []


def test_the_copy_in_the_cache_of_the_hub(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert found(launched(compose, "owner/model")) == []  # nothing is known
    repository = tmp_path / "hub/models--owner--model"
    folder(repository / "snapshots/abc", {"quantization_config": GPTQ}, "README.md")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    [message] = found(
        launched(compose, "owner/model")
    )  # that it has no weights yet is no problem: the job fetches them
    assert message.startswith("model.source=owner/model: is stored quantized (gptq, 4 bits)")
    folder(repository / "snapshots/def", {}, "README.md")
    assert found(launched(compose, "owner/model", "model.revision=def")) == []
    assert launched(compose, "owner/model", "model.revision=def").model.architecture


def test_the_shape_is_read_from_config_json(compose: Compose, tmp_path: Path) -> None:
    config = launched(compose, folder(tmp_path / "m", {"tie_word_embeddings": True, "head_dim": 32}))
    shape = config.model.architecture
    assert shape and (shape.model_type, shape.tie_word_embeddings, shape.extra) == ("llama", True, {"head_dim": 32})
    assert memory.estimate(config)


def test_the_text_of_a_multimodal_model_is_counted_and_its_towers_are_written(compose: Compose, tmp_path: Path) -> None:
    text = {"head_dim": 16, "dtype": "bfloat16"}
    base = folder(tmp_path / "m", {"model_type": "gemma3", "text_config": LLAMA | text, "vision_config": {}})
    (base / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(3 * 2**20))
    config = launched(compose, base)
    alone = launched(compose, folder(tmp_path / "t", {"model_type": "gemma3_text", **text}))
    assert config.model.architecture and alone.model.architecture
    assert config.model.architecture.model_type == "gemma3_text"
    whole, only_text = memory.estimate(config), memory.estimate(alone)
    counts = count(alone.model.architecture, Adapter())
    assert whole and only_text and counts
    assert whole.device == only_text.device and whole.disk.checkpoint == only_text.disk.checkpoint
    towers = whole.disk.merged - only_text.disk.merged
    assert towers == pytest.approx(3 * 2**20 - 2 * counts.total, abs=2**20)


def test_jobs_that_do_not_train_need_no_model(compose: Compose, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", {"quantization_config": GPTQ})
    assert found(launched(compose, base, "jobs=[preprocess]")) == []


def test_a_launch_names_all_problems_and_queues_nothing(launch: Launch, tmp_path: Path) -> None:
    base = folder(tmp_path / "m", {"model_type": "new", "quantization_config": GPTQ, "auto_map": {"AutoConfig": "a.B"}})
    done = launch("model=hub", f"model.source={base}", "data=sample", "cluster=local", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "add model.trust_remote_code=true" in done.stderr and "(gptq, 4 bits)" in done.stderr
    assert len(done.stderr.splitlines()) == 2
