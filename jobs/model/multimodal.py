"""Finds the model of text inside a multimodal model: only that is built and trained.

The towers of images and sound are never loaded. A merge copies them from the files of `model.source`
(`jobs.consolidation.multimodal`). `jobs.model.text_equality` tries whether the model of text computes what the whole one does.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.tensor_io import slices
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.model_files import find_or_download

LOSS_FUNCTION = "load_balancing_loss_func"
"""transformers' name for the loss of routers, in the module of a family that has one."""


def auto_class(model_config: PreTrainedConfig) -> Any:
    """The class of transformers that loads a model as it is stored: with its towers, if it has any."""
    if model_config.get_text_config() is not model_config:
        for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            if type(model_config) in auto._model_mapping:
                return auto
    return AutoModelForCausalLM


def is_multimodal(model_config: PreTrainedConfig) -> bool:
    """Whether the model has a model of text inside, and towers beside it."""
    return auto_class(model_config) is not AutoModelForCausalLM


@dataclass(frozen=True)
class WholeModel:
    """A multimodal model without weights."""

    config: PreTrainedConfig
    model: PreTrainedModel
    """On the meta device."""
    prefixes: tuple[tuple[str, str], ...]
    """Beginnings of names in the model of text -> in this model: `model.` -> `model.language_model.`."""

    def name(self, text_name: str) -> str:
        """The name in this model of a weight or module of the model of text; PEFT's `base_model.model.` stays before it."""
        outer = "base_model.model." if text_name.startswith("base_model.model.") else ""
        inner = f"{text_name.removeprefix(outer)}."
        for text, whole in self.prefixes:
            if inner.startswith(text):
                return f"{outer}{whole}{inner.removeprefix(text)}".removesuffix(".")
        return text_name

    @cached_property
    def text_names(self) -> frozenset[str]:
        """Names of the weights of the model of text in this model."""
        beginnings = tuple(whole for _, whole in self.prefixes)
        return frozenset(name for name in self.model.state_dict() if name.startswith(beginnings))

    def in_memory(self, stored: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """(stored name -> its name in this model, stored name -> the same for tensors that transformers rearranges)."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self.model, add_legacy=False)
        renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        converters = [item for item in transforms if isinstance(item, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        names: dict[str, str] = {}
        rearranged: dict[str, str] = {}
        for name in stored:
            found, pattern = rename_source_key(name, renamings, converters, prefix, state)
            (names if pattern is None else rearranged)[name] = found
        return names, rearranged

    def text_tensors(
        self, text_names: Iterable[str], stored: dict[str, StoredTensor]
    ) -> tuple[dict[str, StoredTensor], str]:
        """(the stored tensors of the model of text by its own names, the first that transformers rearranges while loading)."""
        names, rearranged = self.in_memory(stored)
        own = {self.name(name): name for name in text_names}
        converted = next((name for name, memory in rearranged.items() if memory in self.text_names), "")
        return {own[memory]: stored[name] for name, memory in names.items() if memory in own}, converted


def build_text(
    model_config: PreTrainedConfig, config: Config, attention: Callable[[PreTrainedConfig], str], dtype: torch.dtype
) -> PreTrainedModel:
    """The model of text inside a multimodal model, with an output head. `attention` selects its implementation.

    `whole_of` finds the whole model from it. Raises ConfigError for a model whose text cannot be trained alone.
    """
    whole_class, text_config = auto_class(model_config), copy.deepcopy(model_config.get_text_config())
    with torch.device("meta"):
        empty = whole_class.from_config(model_config)
    decoder = empty.get_decoder()
    if type(text_config) not in AutoModelForCausalLM._model_mapping:
        _register_causal_class(type(text_config), decoder, config)
    if empty.all_tied_weights_keys and _head_is_stored_apart(empty, config):
        model_config.tie_word_embeddings = model_config.get_text_config().tie_word_embeddings = False
        with torch.device("meta"):
            empty = whole_class.from_config(model_config)
    text_config.tie_word_embeddings = bool(empty.all_tied_weights_keys)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        text_config, dtype=dtype, attn_implementation=attention(text_config)
    )
    model.muster_whole = WholeModel(model_config, empty, _prefixes(model, empty, config))  # type: ignore[assignment]
    return model


def whole_of(text_model: Any) -> WholeModel | None:
    """The multimodal model that a model comes from; None for one that is a model of text itself."""
    found: WholeModel | None = getattr(text_model, "muster_whole", None)
    return found


def _refusal(config: Config, model: nn.Module, reason: str) -> ConfigError:
    message = f"its text cannot be trained alone, because {type(model).__name__} {reason}. Name a model of text"
    return ConfigError(Problem("model.source", config.model.source, message))


def _prefixes(text: Any, whole: Any, config: Config) -> tuple[tuple[str, str], ...]:
    """Where decoder and output head of the model of text lie in the whole one, which must have all of their weights."""
    decoder, head = text.base_model, whole.get_output_embeddings()
    places = [name for name, module in whole.named_modules() if type(module) is type(decoder)]
    heads = [name for name, module in whole.named_modules() if module is head]
    own_heads = [name for name, module in text.named_modules() if module is text.get_output_embeddings()]
    if len(places) != 1 or len(heads) != 1 or len(own_heads) != 1:
        raise _refusal(config, whole, f"has {len(places)} decoders of text and {len(heads)} output heads")
    prefixes: tuple[tuple[str, str], ...] = (("", f"{places[0]}."),)  # the whole model has it with its head
    if decoder is not text:
        prefixes = ((f"{text.base_model_prefix}.", f"{places[0]}."), (f"{own_heads[0]}.", f"{heads[0]}."))
    made, stored = WholeModel(whole.config, whole, prefixes), whole.state_dict()
    for name, value in text.state_dict().items():
        if made.name(name) not in stored or stored[made.name(name)].shape != value.shape:
            raise _refusal(config, whole, f"has no {name} of the shape {list(value.shape)}")
    return prefixes


def _head_is_stored_apart(whole: Any, config: Config) -> bool:
    """Whether the files hold a head of its own, although the config ties it to the embedding: then transformers unties it.

    The classes of many families tie by default, and the config.json of a model with a head of its own may not say so.
    """
    head = _name_of(whole, whole.get_output_embeddings())
    embedding = _name_of(whole, whole.get_input_embeddings())
    folder = find_or_download(config.model.source, config.model.revision)
    if folder is None:
        return False
    stored = slices.find_tensors(folder, "model.source", config.model.source)
    names, _ = WholeModel(whole.config, whole, ()).in_memory(stored)
    found = {memory: stored[name] for name, memory in names.items() if memory in (head, embedding)}
    return len(found) == 2 and not slices.probably_equal(folder, found[head], found[embedding])


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(f"{name}.weight" for name, item in model.named_modules() if item is module)


class _HeadOnDecoder:
    """A causal language model of a decoder for which transformers has none alone."""

    decoder_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg] # the next class is the family's PreTrainedModel
        self.model = self.decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Logits, and on demand the loss of the routers, as the whole model computes them."""
        routers = {"output_router_logits": True} if output_router_logits else {}
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **routers, **kwargs)
        loss, function = None, getattr(sys.modules[type(self).__module__], LOSS_FUNCTION, None)
        if output_router_logits and function is not None:
            config: Any = self.config  # type: ignore[attr-defined]
            loss = function(outputs.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
        return MoeCausalLMOutputWithPast(
            aux_loss=loss,
            logits=self.lm_head(outputs.last_hidden_state),
            past_key_values=outputs.get("past_key_values"),
            router_logits=outputs.get("router_logits"),
        )


def _register_causal_class(config_class: type[PreTrainedConfig], decoder: nn.Module, config: Config) -> None:
    """Let AutoModelForCausalLM build the decoder with an output head: transformers has it as a part of the whole model only."""
    parents = [
        item for item in type(decoder).__mro__ if issubclass(item, PreTrainedModel) and item is not type(decoder)
    ]
    if not parents or parents[0] is PreTrainedModel or type(decoder).__name__.endswith("ForCausalLM"):
        raise _refusal(config, decoder, "is no decoder of text")
    fields = {
        "config_class": config_class,
        "decoder_class": type(decoder),
        "base_model_prefix": "model",
        "_tied_weights_keys": {"lm_head.weight": "model.embed_tokens.weight"},
        "__module__": type(decoder).__module__,  # where router_loss looks for the loss of the family
    }
    name = f"{type(decoder).__name__.removesuffix('Model')}ForCausalLM"
    made = type(name, (_HeadOnDecoder, parents[0], GenerationMixin), fields)
    # not `AutoModelForCausalLM.register`, which ignores transformers' own configs without a word in 5.17
    AutoModelForCausalLM._model_mapping._extra_content[config_class] = made


def towers(whole: WholeModel, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensors that are not of the model of text."""
    names, rearranged = whole.in_memory(stored)
    memory = names | rearranged
    return {name: tensor for name, tensor in stored.items() if memory[name] not in whole.text_names}


def check_towers(
    whole: WholeModel, stored: dict[str, StoredTensor], source: str, is_ignored: Callable[[PreTrainedModel, str], bool]
) -> tuple[list[str], str]:
    """(what the files lack or have too much beside the model of text, the log line on what is not loaded)."""
    found, state = towers(whole, stored), whole.model.state_dict()
    names, rearranged = whole.in_memory(found)
    second_names = (getattr(whole.model, "all_tied_weights_keys", None) or {}).keys()
    missing = sorted(state.keys() - whole.text_names - set(names.values()) - second_names)
    problems = [] if rearranged else [f"{name} is in none of the files" for name in missing]
    problems += [
        f"{stored_name} is in the files but not in the model"
        for stored_name, name in names.items()
        if name not in state and not is_ignored(whole.model, stored_name)
    ]
    size = sum(tensor.nbytes for tensor in found.values()) / 2**30
    return problems, f"weights   vision tower ({len(found)} tensors, {size:.2f} GiB) stays as it is in {source}"
