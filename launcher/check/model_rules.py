"""Refuses a model that can never train, from its config.json and the names of its files; pure."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from conf import stored_quantization
from conf.choices import AdapterKind, Frozen, Init, Precision
from conf.errors import Problem
from conf.schema import Config
from launcher.check.model_files import Families, ModelFiles
from launcher.estimate.config_json import TEXTS, is_multimodal, text_fields
from launcher.estimate.family_defaults import ALIASES, DEFAULTS
from launcher.estimate.parameters import count

ENCODERS = frozenset({
    *("albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert"),
    *("electra", "ernie", "esm", "eurobert", "flaubert", "funnel", "ibert", "jina_embeddings_v3", "layoutlm", "longformer"),
    *("luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "nezha", "nomic_bert", "nystromformer"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "splinter", "squeezebert", "tapas"),
    *("xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso"),
})  # fmt: skip
"""Families that see the whole text at once. They cannot write one, unless config.json says `is_decoder`."""
ENCODER_DECODERS = frozenset({
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100", "marian", "mbart"),
    *("mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet", "switch_transformers", "t5", "t5gemma"),
    *("t5gemma2", "umt5", "whisper", "xlm-prophetnet"),
})  # fmt: skip
NEEDS_IMAGE = "it reads no text without an image"
NO_TEXT_ALONE = {
    "mllama": "its decoder has layers that only images train",
    "cohere2_vision": "it scales the scores of tokens otherwise than its model of text",
    **dict.fromkeys(("blip", "blip-2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5"), NEEDS_IMAGE),
    **dict.fromkeys(("florence2", "pix2struct", "udop", "vision-encoder-decoder", "pp_formulanet"), NEEDS_IMAGE),
}
"""Multimodal families whose text cannot be trained alone -> why.

When training starts, `jobs.model.text_equality` tries every other family, and refuses it if its model of text computes
something else.
"""
CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}
"""Families with layers that are not nn.Linear where other families have linear layers."""
PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of tokenizers that have no tokens besides those of the files."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Numbers that every family needs above 0, by the names that `ALIASES` gives them."""
WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")


def problems(config: Config, files: ModelFiles | None, families: Families | None) -> Iterator[Problem]:
    """What makes it impossible to train `model.source`. Nothing is known of a model that is not on this machine."""
    if config.model.init is not Init.pretrained or "train" not in config.jobs:
        return
    for pattern in config.model.ignore_tensors:
        try:
            re.compile(pattern)
        except re.error as error:
            message = f"is no regular expression ({error}). Put a backslash before signs that stand for themselves"
            yield Problem("model.ignore_tensors", pattern, message)
    if files is not None:
        yield from _files(config, files)
        yield from _damage(config, files)
        if files.fields is not None:
            yield from _family(config, files.fields, families)
            yield from _numbers(config, files.fields)
            yield from _quantization(config, files.fields, files.quantization)
            yield from _vocabulary(config, files)
            yield from _padding(config, files.tokenizer)
            yield from _dora(config, files.fields)


def _source(config: Config, message: str) -> Problem:
    return Problem("model.source", config.model.source, message)


def _files(config: Config, files: ModelFiles) -> Iterator[Problem]:
    """The files of a folder: config.json, weights, and nothing that would be left out in silence."""
    names = files.names
    gguf = any(name.endswith(".gguf") for name in names)
    weights = any(name.endswith(WEIGHTS) and not name.startswith(("adapter_", "training_args")) for name in names)
    if files.error:
        yield _source(config, f"{files.error}. Download the model again, or name another one")
    if files.adapter is not None:
        kind, base = files.adapter.get("peft_type") or "PEFT", files.adapter.get("base_model_name_or_path")
        of = f" of {base}" if base else ""
        if files.fields is None:
            message = f"is an adapter ({kind}){of}, not a model. Merge it into its model, and name the merged folder"
            yield _source(config, message)
            return
        message = f"holds an adapter ({kind}){of} beside a model, and it would not be used. Merge it into the model, and name "
        yield _source(
            config, message + "the merged folder, or move adapter_config.json away to train the model without it"
        )
    if gguf and not weights:
        message = "has weights in GGUF only, which are made for inference. Name the original model, with *.safetensors"
        yield _source(config, message)
    elif files.fields is None and not files.error and files.local:
        if "config.yaml" in names and ("checkpoints" in names or "model" in names):
            message = f"is a run folder. Name its merged model: model.source={config.model.source}/model"
        else:
            message = (
                "has no config.json, so it is not a model of transformers. Name a folder with config.json and weights"
            )
        yield _source(config, message)
    elif files.local and files.fields is not None and weights and is_multimodal(files.fields):
        if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
            message = (
                "is a model of images or sound and text without *.safetensors, from which a merge copies what is not "
            )
            yield _source(config, message + "trained. Save it with save_pretrained, and name that folder")
    elif files.local and files.fields is not None and not weights:
        message = "has no weights (*.safetensors or *.bin). Name a folder with weights, or a model on the Hub"
        yield _source(config, message)


def _damage(config: Config, files: ModelFiles) -> Iterator[Problem]:
    """Files of a model that cannot be read."""
    if files.fields is not None:
        yield from (_source(config, f"{why}. Download the model again") for why in files.damage)
    if files.tokenizer_damage and files.fields is not None:
        key = "model.tokenizer" if config.model.tokenizer else "model.source"
        remedy = "Set model.tokenizer to a folder with a tokenizer, or to owner/name on the Hub"
        yield Problem(key, config.model.tokenizer or config.model.source, f"{files.tokenizer_damage}. {remedy}")


def _family(config: Config, fields: Mapping[str, Any], families: Families | None) -> Iterator[Problem]:
    """The family: a decoder of text that transformers can build."""
    family, remote = fields.get("model_type"), fields.get("auto_map")
    if not isinstance(family, str) or not family:
        yield _source(
            config, "its config.json has no model_type, so its family is not known. Add model_type to config.json"
        )
        return
    built_in = family in (families.text | families.multimodal if families else {*DEFAULTS, *TEXTS})
    text = text_fields(fields)
    inside = text.get("model_type", family)
    if {family, inside} & ENCODER_DECODERS or True in (
        fields.get("is_encoder_decoder"),
        text.get("is_encoder_decoder"),
    ):
        message = (
            f"is an encoder with a decoder (model_type={family}). Muster trains models that continue a text. Name a "
        )
        yield _source(config, message + "decoder, for example model=qwen0_5b")
    elif {family, inside} & ENCODERS and True not in (fields.get("is_decoder"), text.get("is_decoder")):
        message = (
            f"is an encoder (model_type={inside}), which cannot write text. Name a decoder, for example model=qwen0_5b"
        )
        yield _source(config, message)
    elif remote and not built_in:
        if not config.model.trust_remote_code:
            message = (
                f"comes with Python code of its own (auto_map in config.json, model_type={family}), which transformers "
            )
            message += "does not have. Read that code, then add model.trust_remote_code=true"
            yield _source(config, message)
    elif family in NO_TEXT_ALONE:
        message = f"is a model of images or sound and text (model_type={family}), whose text cannot be trained alone: "
        yield _source(config, f"{message}{NO_TEXT_ALONE[family]}. Name a model of text")
    elif families and not built_in:
        message = f"has model_type={family}, which the installed transformers cannot build as a model of text. Install a newer "
        yield _source(config, message + "transformers, or name a model of another family")


def _numbers(config: Config, fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Sizes in config.json that no model can have."""
    for name, value in text_fields(fields).items():
        if ALIASES.get(name, name) in SIZES and (isinstance(value, str) or (type(value) is int and value < 1)):
            yield _source(
                config, f"its config.json has {name}={value!r}, which must be a whole number above 0. Correct it"
            )


def _quantization(config: Config, fields: Mapping[str, Any], older: Mapping[str, Any] | None) -> Iterator[Problem]:
    """Stored quantization that cannot be undone. `older`: the file that GPTQ models had before transformers knew them."""
    found = stored_quantization.find(fields)
    if found is None and older is not None:
        found = {"quant_method": "gptq", **older}
    if found is None:
        return
    if stored_quantization.can_dequantize(found):
        if is_multimodal(fields):
            message = f"is a model of images or sound and text that is stored quantized ({stored_quantization.label(found)}), "
            yield _source(
                config, message + "and a merge could not copy its towers. Set model.source to the original model"
            )
        return
    message = (
        f"is stored quantized ({stored_quantization.label(found)}), and such weights cannot be trained. Set model.source to the "
        "original model. "
    )
    yield _source(
        config, message + "To train on a quantized base, add adapter=qlora: Muster quantizes it while it loads"
    )


def notes(config: Config, files: ModelFiles | None) -> list[str]:
    """Lines about what training does with the stored weights: dequantizes them, adds rows for tokens, leaves such rows frozen."""
    if files is None or files.fields is None or "train" not in config.jobs or config.model.init is not Init.pretrained:
        return []
    rows, tokens = text_fields(files.fields).get("vocab_size"), files.tokens
    grows = type(rows) is int and tokens is not None and tokens > rows
    added = [f"base      the embedding grows from {rows} to {tokens} rows, one for each token"] if grows else []
    found = stored_quantization.find(files.fields)
    return [*added, *_frozen_rows(config), *([] if found is None else [_dequantization(config, found)])]


def _frozen_rows(config: Config) -> list[str]:
    """That an adapter leaves the rows of special tokens as they are, where the model has rows for them."""
    tokens, adapter = config.data.special_tokens, config.adapter
    if not tokens or adapter.kind is AdapterKind.none or adapter.modules_to_save:
        return []
    return [
        f"adapter   trains neither embedding nor head, so the rows of {', '.join(tokens)} stay as the model has them; "
        "adapter.modules_to_save=[embed_tokens,lm_head] trains them"
    ]


def _dequantization(config: Config, found: Mapping[str, Any]) -> str:
    """To which dtype stored weights are dequantized, and how large they are then."""
    has_adapter, base = config.adapter.kind is not AdapterKind.none, config.adapter.base
    precision = config.train.precision if has_adapter else Precision.fp32
    dtype = "bf16 or fp16" if precision is Precision.auto else precision.name  # the GPUs decide it
    counts = count(config.model.architecture, config.adapter) if config.model.architecture else None
    size = f", {counts.total * (4 if dtype == 'fp32' else 2) / 2**30:.1f} GiB in all" if counts else ""
    then = f", and then quantized to {base.name}" if base is not Frozen.full else ""
    return (
        f"base      {config.model.source} is stored quantized ({stored_quantization.label(found)}): each rank dequantizes the "
        f"part that it reads to {dtype}{size}{then}"
    )


def _dora(config: Config, fields: Mapping[str, Any]) -> Iterator[Problem]:
    """DoRA on layers whose weights are stored transposed (Conv1D)."""
    layers = CONV1D.get(str(fields.get("model_type")), ())
    named = [item for item in config.adapter.targets if item == "all-linear" or item.rpartition(".")[2] in layers]
    if layers and named and config.adapter.dora and config.adapter.kind is not AdapterKind.none:
        message = (
            f"adapts linear layers only, but {', '.join(layers)} of a {fields['model_type']} model are Conv1D layers. "
        )
        yield Problem("adapter.dora", True, message + "Use adapter.dora=false, for example with adapter=lora")


def _vocabulary(config: Config, files: ModelFiles) -> Iterator[Problem]:
    """Every token needs a row in the embedding. A full fine-tune adds rows for added tokens only."""
    rows = text_fields(files.fields or {}).get("vocab_size")
    if type(rows) is not int or files.tokens is None or files.base_tokens is None:
        return
    key = "model.tokenizer" if config.model.tokenizer else "model.source"
    value = config.model.tokenizer or config.model.source
    if files.base_tokens > rows:
        message = f"the vocabulary of the tokenizer has {files.base_tokens} tokens, but the model has only {rows} (vocab_size). "
        yield Problem(
            key, value, message + "It is the tokenizer of another model. Set model.tokenizer to that of this model"
        )
    elif files.tokens > rows and config.adapter.kind is not AdapterKind.none and not config.adapter.modules_to_save:
        message = f"the tokenizer has {files.tokens} tokens, but the model has only {rows} (vocab_size), and an adapter does not "
        yield Problem(
            key,
            value,
            message + "train new ones. Set adapter.modules_to_save=[embed_tokens,lm_head], or use adapter=none",
        )


def _padding(config: Config, tokenizer: Mapping[str, Any] | None) -> Iterator[Problem]:
    """Rows are padded with the tokenizer's pad_token, else with its eos_token. Only classes without default tokens are judged."""
    if tokenizer is None or tokenizer.get("tokenizer_class") not in PLAIN_TOKENIZERS:
        return
    if not any((tokenizer.get("pad_token"), tokenizer.get("eos_token"), config.data.pad_token, config.data.eos_token)):
        key = "model.tokenizer" if config.model.tokenizer else "model.source"
        message = "its tokenizer names neither a pad_token nor an eos_token, so that rows cannot be padded. "
        message += "Set data.eos_token to the token that ends a text"
        yield Problem(key, config.model.tokenizer or config.model.source, message)
