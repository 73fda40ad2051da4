"""launcher/decoder_blocks.py: the classes that Accelerate wraps, compared with transformers and as Accelerate looks for them."""

import pytest
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from launcher.decoder_blocks import DECODER_BLOCKS
from launcher.environment import job_variables
from launcher.plan import plan
from tests.conftest import Compose
from tests.jobs import families

pytestmark = pytest.mark.filterwarnings("ignore")
ODD = ["llama", "qwen3_5_text", "gemma4_text", "olmo_hybrid", "jamba", "mamba", "gpt2"]
BUILT = [name for name in families.FAMILIES if name not in ODD]


def found(family: str) -> tuple[str, set[str]]:
    """(model_type, classes of the model's own list that it has)."""
    kind, values = families.FAMILIES[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    return kind, {name for name in model._no_split_modules if get_module_class_from_name(model, name)}


@pytest.mark.parametrize("family", [*ODD, *(pytest.param(name, marks=pytest.mark.proof) for name in BUILT)])
def test_the_table_has_the_blocks_of_a_built_model(family: str) -> None:
    kind, expected = found(family)
    assert set(DECODER_BLOCKS[kind].split(",")) == expected


@pytest.mark.proof
@pytest.mark.parametrize("kind", DECODER_BLOCKS)
def test_every_entry_is_in_the_list_of_transformers(kind: str) -> None:
    assert kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model_class = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(kind))]
    assert set(DECODER_BLOCKS[kind].split(",")) <= set(model_class._no_split_modules)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_model_of_the_hub_names_its_blocks(family: str, compose: Compose, tmp_path) -> None:
    kind, values = families.FAMILIES[family]
    AutoConfig.for_model(kind, **values).save_pretrained(tmp_path)
    config = compose("cluster=slurm", "model=hub", f"model.source={tmp_path}", "parallel=fsdp")
    train = next(job for job in plan(config) if job.name == "train")
    assert job_variables(config, train)["FSDP_TRANSFORMER_CLS_TO_WRAP"] == DECODER_BLOCKS[kind]
