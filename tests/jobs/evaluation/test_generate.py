"""The job generate with two small models: each answer equals transformers' own, and faults can fail the job."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.errors import DataError
from conf.schema import Config
from jobs import generate
from jobs.model import build
from jobs.tokenization.tokenizer import load_tokenizer
from tests.conftest import Compose

TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "What is a shard?"},
]


@pytest.fixture(scope="module")
def config(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with a consolidated model, and a base of other weights."""
    folder = tmp_path_factory.mktemp("generate")
    for name, seed in (("base", 1), ("run/model", 2)):
        tiny = compose("model=tiny", f"train.seed={seed}")
        torch.manual_seed(seed)
        build.build(tiny).save_pretrained(folder / name)
        load_tokenizer(tiny).save_pretrained(folder / name)
    (folder / "run/model/muster.json").write_text('{"checkpoint": "step-00000001", "dtype": "fp32"}')
    (folder / "prompts.jsonl").write_text(
        json.dumps({"prompt": "What?", "reference": "That."}) + "\n" + json.dumps({"messages": TURNS})
    )
    words = [
        "model=hub",
        f"model.source={folder}/base",
        f"run_dir={folder}/run",
        f"generate.prompts={folder}/prompts.jsonl",
    ]
    return compose(*words, "generate.max_new_tokens=8", "generate.system=Be kind.", "generate.compare_base=true")


def expected(folder: Path, messages: list[dict[str, str]]) -> str:
    """The answer of plain transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be kind."}, *messages],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>"]) + [tokenizer.eos_token_id]
    output = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_answers_equal_those_of_transformers_for_both_models(config: Config) -> None:
    generate.run(config)
    run, base = Path(config.run_dir), Path(config.model.source)
    found = json.loads((run / "generations.json").read_text())
    for item, messages in zip(found["answers"], ([{"role": "user", "content": "What?"}], TURNS), strict=True):
        assert item["answer"] == expected(run / "model", messages)
        assert item["base"] == expected(base, messages) != item["answer"]
    assert [item["reference"] for item in found["answers"]] == ["That.", None]
    assert found["settings"]["system"] == "Be kind."


def test_faults_that_may_not_be_fail_the_job_after_the_files_are_written(
    config: Config, compose: Compose, tmp_path: Path
) -> None:
    shutil.copytree(Path(config.run_dir) / "model", tmp_path / "model")
    words = [
        f"run_dir={tmp_path}",
        "model=hub",
        f"model.source={config.model.source}",
        f"generate.prompts={config.generate.prompts}",
    ]
    strict = compose(*words, "generate.max_new_tokens=2", "generate.fail_on=[endless]")
    with pytest.raises(DataError, match=r"generate.fail_on=.*endless.*: 2 of 2 answers had not ended after"):
        generate.run(strict)
    assert (tmp_path / "generations.html").exists()
