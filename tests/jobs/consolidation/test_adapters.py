"""Merged adapters of every kind that PEFT makes give the logits of PEFT's own model, or are refused with what helps."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conf.errors import UserError
from conf.files import read_json, write_json
from jobs.consolidation import external, live_check, updates
from tests.jobs import shards

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

BASES = {
    "untied": ("llama", {**shards.SMALL, "tie_word_embeddings": False}),
    "tied": ("llama", {**shards.SMALL, "tie_word_embeddings": True}),
    "biased": ("qwen2", {**shards.SMALL, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}),
    "mixtral": ("mixtral", {**shards.SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        {**shards.SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16},
    ),
}  # fmt: skip
Q_AND_V = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases("tied")`: the folder of a base model in fp32."""
    made = {}

    def base(name):
        if name not in made:
            kind, fields = BASES[name]
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields)
            made[name] = tmp_path_factory.mktemp("bases") / name
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(made[name])
        return made[name]

    return base


def load(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def trained(model):
    """Random steps away from where each trained weight began."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1.1)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def adapted(base, **words):
    settings = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", "target_modules": Q_AND_V} | words
    return trained(get_peft_model(load(base), LoraConfig(**settings)))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(3, 35)[None]).logits[0]


def merge(checkpoint, base, out):
    external.main([str(checkpoint), "--out", str(out), "--base", str(base), "--dtype", "fp32"])
    merged, problems = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(problems.values()) and read_json(out / "muster.json")["verified"]
    return merged


KINDS = [
    pytest.param("untied", {"target_modules": "all-linear"}, id="all-linear"),
    pytest.param("untied", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}, id="rsdora"),
    pytest.param("untied", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}, id="patterns"),
    pytest.param("untied", {"target_modules": [*Q_AND_V, "embed_tokens"], "use_dora": True}, id="dora-embedding"),
    pytest.param("untied", {"target_modules": ["lm_head", "embed_tokens"]}, id="both-ends"),
    pytest.param("tied", {"target_modules": [*Q_AND_V, "embed_tokens"]}, id="tied-embedding"),
    pytest.param("tied", {"target_modules": [*Q_AND_V, "embed_tokens"], "use_dora": True}, id="tied-dora-embedding"),
    pytest.param("tied", {"target_modules": [*Q_AND_V, "lm_head"]}, id="tied-head"),
    pytest.param("tied", {"target_modules": [*Q_AND_V, "lm_head", "embed_tokens"]}, id="tied-both-ends"),
    pytest.param("tied", {"modules_to_save": ["lm_head"]}, id="tied-saved-head"),
    pytest.param("tied", {"modules_to_save": ["embed_tokens"]}, id="tied-saved-embedding"),
    pytest.param("tied", {"modules_to_save": ["lm_head", "embed_tokens"]}, id="tied-saved-both"),
    pytest.param("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, id="kept-tied-saved"),
    pytest.param(
        "tied", {"target_modules": [*Q_AND_V, "embed_tokens"], "ensure_weight_tying": True}, id="kept-tied-lora"
    ),
    pytest.param("tied", {"modules_to_save": ["norm"]}, id="saved-norms"),
    pytest.param("biased", {"lora_bias": True}, id="lora_bias"),
    pytest.param("biased", {"bias": "all"}, id="all-biases"),
    pytest.param("biased", {"bias": "lora_only", "use_dora": True}, id="biases-of-adapted"),
    pytest.param("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, id="conv1d"),
    pytest.param(
        "gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}, id="conv1d-dora"
    ),
    pytest.param("gpt2", {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}, id="conv1d-tied-head"),
    pytest.param("gpt2", {"target_modules": ["wte", "wpe"]}, id="gpt2-embeddings"),
    pytest.param("untied", {"init_lora_weights": "pissa"}, id="pissa"),
    pytest.param("untied", {"init_lora_weights": "pissa", "use_dora": True}, id="pissa-dora"),
    pytest.param("untied", {"init_lora_weights": "olora"}, id="olora"),
    pytest.param(
        "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}, id="conv1d-pissa"
    ),
    pytest.param("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, id="experts"),
    pytest.param(
        "gpt_oss",
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        id="transposed-experts",
    ),
    pytest.param(
        "mixtral", {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}, id="one-of-experts"
    ),
]


@pytest.mark.parametrize(("name", "words"), KINDS)
def test_logits_are_those_of_peft(name, words, bases, tmp_path, monkeypatch) -> None:
    """As PEFT loads the adapter; the merge's own comparison is off, so that it cannot refuse first."""
    monkeypatch.setattr(live_check, "compare_with_peft", lambda *_: None)
    live = adapted(bases(name), **words)
    live.save_pretrained(tmp_path / "adapter")
    merged = merge(tmp_path / "adapter", bases(name), tmp_path / "out")
    wanted = logits(live)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, logits(load(bases(name))), atol=1e-2)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(load(bases(name)), tmp_path / "adapter")), wanted, rtol=1e-4, atol=1e-5
    )
    changes_ends = any(part in str(words) for part in ("lm_head", "embed_tokens", "wte"))
    keeps_tied = not changes_ends or bool(words.get("ensure_weight_tying"))
    if BASES[name][1].get("tie_word_embeddings", name == "gpt2"):
        assert read_json(tmp_path / "out/config.json")["tie_word_embeddings"] is keeps_tied
        assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) is not keeps_tied


@pytest.mark.parametrize("words", [{}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_whole_checkpoint_of_a_peft_model(name, words, bases, tmp_path) -> None:
    """Base weights, adapters and trained copies in one DCP folder, with adapter_config.json beside it."""
    live = adapted(bases(name), **words)
    dcp.save({"model": dict(live.state_dict())}, checkpoint_id=tmp_path / "ck", no_dist=True)
    live.peft_config["default"].save_pretrained(tmp_path / "ck")
    torch.testing.assert_close(
        logits(merge(tmp_path / "ck", bases(name), tmp_path / "out")), logits(live), rtol=1e-4, atol=1e-5
    )


def refused(checkpoint, base, out, message) -> None:
    with pytest.raises(UserError, match=message):
        external.main([str(checkpoint), "--out", str(out), "--base", str(base), "--dtype", "fp32"])
    assert not out.exists()


OTHERS = [
    pytest.param(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "IA3", id="ia3"),
    pytest.param(LoHaConfig(r=2, target_modules=Q_AND_V), "LOHA", id="loha"),
    pytest.param(LoKrConfig(r=2, target_modules=Q_AND_V), "LOKR", id="lokr"),
    pytest.param(VeraConfig(r=2, target_modules=["q_proj", "o_proj"]), "VERA", id="vera"),
    pytest.param(
        LoraConfig(r=2, target_modules=Q_AND_V, trainable_token_indices=[5, 9]), "trainable_token_indices", id="tokens"
    ),
]


@pytest.mark.parametrize(("config", "named"), OTHERS)
def test_other_kinds_are_refused_and_the_remedy_works(config, named, bases, tmp_path) -> None:
    config.task_type = "CAUSAL_LM"
    live = trained(get_peft_model(load(bases("untied")), config))
    live.save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "adapter", bases("untied"), tmp_path / "out", rf"peft_type=.*{named}.*merge it with PEFT")
    # as the message says
    apart = PeftModel.from_pretrained(load(bases("untied")), tmp_path / "adapter")
    apart.merge_and_unload().save_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(live), rtol=1e-4, atol=1e-5)


def test_an_init_that_cannot_be_repeated_is_refused_and_the_remedy_works(bases, tmp_path) -> None:
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=Q_AND_V, init_lora_weights="pissa_niter_4")
    live = get_peft_model(load(bases("untied")), settings)
    live.save_pretrained(tmp_path / "first")
    trained(live).save_pretrained(tmp_path / "adapter")
    refused(
        tmp_path / "adapter", bases("untied"), tmp_path / "out", "init_lora_weights=pissa_niter_4.*path_initial_model"
    )
    wanted = logits(live)
    first = read_json(tmp_path / "first/adapter_config.json")
    write_json(tmp_path / "first/adapter_config.json", first | {"init_lora_weights": True})
    live.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    found = logits(merge(tmp_path / "plain", bases("untied"), tmp_path / "merged"))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_bias_without_one_in_the_base_is_refused_as_peft_does(bases, tmp_path) -> None:
    adapted(bases("untied"), lora_bias=True).save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "adapter", bases("untied"), tmp_path / "out", "lora_bias.*PEFT cannot merge it either")


def change(adapter, function) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    function(weights)
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layers.1.self_attn.v_proj.lora_B", r"1 parts of adapters are missing .*layers\.1.*v_proj\.lora_B"),
        ("layers.1.", "4 parts of adapters are missing"),
        ("lm_head", r"missing \['lm_head\.weight'\].*with all of its weights"),
    ],
)
def test_a_part_of_an_adapter_is_refused(part, message, bases, tmp_path) -> None:
    adapted(bases("untied"), modules_to_save=["lm_head"]).save_pretrained(tmp_path / "adapter")
    change(
        tmp_path / "adapter",
        lambda weights: [weights.pop(name) for name in list(weights) if part in name],
    )
    refused(tmp_path / "adapter", bases("untied"), tmp_path / "out", message)


def test_settings_of_another_adapter_are_refused(bases, tmp_path) -> None:
    adapted(bases("untied"), target_modules="all-linear").save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"target_modules": Q_AND_V}))
    refused(tmp_path / "adapter", bases("untied"), tmp_path / "out", r"20 are unknown \(model\.layers\.0\.mlp")
    path.write_text(json.dumps(settings | {"r": 8}))
    refused(tmp_path / "adapter", bases("untied"), tmp_path / "out", "has rank 4, but its settings say 8")


def test_two_adapters_are_refused_and_the_remedy_works(bases, tmp_path) -> None:
    live = adapted(bases("untied"))
    live.add_adapter("second", LoraConfig(r=2, target_modules=Q_AND_V))
    dcp.save({"model": dict(live.state_dict())}, checkpoint_id=tmp_path / "ck", no_dist=True)
    live.peft_config["default"].save_pretrained(tmp_path / "ck")
    refused(
        tmp_path / "ck", bases("untied"), tmp_path / "out", r"holds 2 adapters \(default, second\).*selected_adapters"
    )
    live.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    merge(tmp_path / "adapter", bases("untied"), tmp_path / "out")


@pytest.mark.parametrize(("free", "message"), [(2**40, "logits differ by"), (0, "is not what PEFT merges")])
def test_a_wrong_merge_is_not_published(free, message, bases, tmp_path, monkeypatch) -> None:
    """The comparison is made with PEFT's own merge, not with what was planned."""
    adapted(bases("tied")).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(live_check.host_memory, "free_bytes", lambda: free)
    real = updates._make_update
    monkeypatch.setattr(
        updates, "_make_update", lambda layer, parts: real(layer, {**parts, "lora_A": 2 * parts["lora_A"]})
    )
    refused(tmp_path / "adapter", bases("tied"), tmp_path / "out", f"{message}.* not published")


@pytest.mark.parametrize(
    "words", [{}, {"use_dora": True, "target_modules": "all-linear"}, {"target_modules": ["embed_tokens"]}]
)
def test_layers_of_models_too_large_for_memory_are_compared(words, bases, tmp_path, monkeypatch, capsys) -> None:
    adapted(bases("tied"), **words).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(live_check.host_memory, "free_bytes", lambda: 1000)
    merge(tmp_path / "adapter", bases("tied"), tmp_path / "out")
    said = capsys.readouterr().out
    assert "logits not compared: two models in fp32 need" in said
    assert ("verified  4 adapted layers equal PEFT's" in said) is ("embed_tokens" not in str(words))
