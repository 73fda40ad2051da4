"""Tokens added by the config: the tokenizer never splits them, and the embedding has a row for each."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.errors import ConfigError, DataError
from jobs.model import build
from jobs.tokenization.tokenizer import load_tokenizer
from tests.conftest import Compose


@pytest.fixture
def stored(compose: Compose, tmp_path: Path):
    """A function that saves a model with an embedding of the bundled tokenizer's size, and returns the overrides that select it."""

    def saved(tied):
        config = compose(f"model.architecture.tie_word_embeddings={tied}".lower())
        tokenizer = load_tokenizer(config)
        whole = build.build(config)
        whole.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return ["model=hub", f"model.source={tmp_path}/model", "model.init=pretrained"]

    return saved


def test_added_tokens_are_never_split(compose: Compose) -> None:
    tokenizer = load_tokenizer(compose("data.special_tokens=['<tool>','</tool>']", "data.pad_token='<tool>'"))
    ids = tokenizer("a<tool>b</tool>", add_special_tokens=False).input_ids
    assert {"<tool>", "</tool>"} <= set(tokenizer.convert_ids_to_tokens(ids))
    assert tokenizer.pad_token == "<tool>"
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_end_of_text_can_be_another_token(compose: Compose) -> None:
    tokenizer = load_tokenizer(compose("data.special_tokens=['<stop>']", "data.eos_token='<stop>'"))
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<stop>")


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
def test_an_unknown_token_is_refused(key, compose: Compose) -> None:
    with pytest.raises(
        DataError, match=f"data.{key}=<nothing>: is not a token of the tokenizer: add it to data.special_tokens"
    ):
        load_tokenizer(compose(f"data.{key}='<nothing>'"))


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_those_before(tied, stored, compose: Compose) -> None:
    overrides = stored(tied)
    before = AutoModelForCausalLM.from_pretrained(overrides[1].removeprefix("model.source="))
    grown = build.build(compose(*overrides, "data.special_tokens=['<one>','<two>']"))
    for old, new in (
        (before.get_input_embeddings().weight, grown.get_input_embeddings().weight),
        (before.get_output_embeddings().weight, grown.get_output_embeddings().weight),
    ):
        assert len(new) == grown.config.vocab_size
        assert torch.equal(new[: len(old)], old)
        assert len(new) > len(old)
        torch.testing.assert_close(new[len(old) :], old.mean(0).expand(len(new) - len(old), -1))


def test_an_adapter_cannot_train_new_rows(stored, compose: Compose) -> None:
    with pytest.raises(ConfigError, match="data.special_tokens.*an adapter does not train the embedding"):
        build.build(compose(*stored(False), "adapter=lora", "data.special_tokens=['<one>','<two>']"))


def test_tokens_that_the_tokenizer_adds_itself_are_not_called_special_tokens(
    stored, compose: Compose, tmp_path
) -> None:
    overrides = stored(False)
    grown = load_tokenizer(compose("data.special_tokens=['<one>']"))
    grown.save_pretrained(tmp_path / "grown")
    with pytest.raises(ConfigError, match=r"^model.tokenizer=.*/grown: .*an adapter does not train the embedding"):
        build.build(compose(*overrides, "adapter=lora", f"model.tokenizer={tmp_path}/grown"))
    build.build(compose(*overrides, "adapter=none", f"model.tokenizer={tmp_path}/grown"))  # what the message says
