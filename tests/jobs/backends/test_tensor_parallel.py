"""jobs/backends/tensor_parallel.py: which entries of transformers' plans are followed."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from conf.errors import ConfigError
from jobs.backends.tensor_parallel import slice_matrices


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tensor",))
    dist.destroy_process_group()


def model_with(plan: dict[str, str]) -> torch.nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    config.base_model_tp_plan = {**(LlamaConfig.base_model_tp_plan or {}), **plan}
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def test_embeddings_stay_whole(mesh: DeviceMesh) -> None:
    """transformers 5.17 has an entry for the embedding of tied models."""
    model = model_with({"embed_tokens": "embedding_rowwise"})
    slice_matrices(model, mesh)
    sliced = {name for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    assert "model.embed_tokens.weight" not in sliced
    assert "model.layers.0.self_attn.q_proj.weight" in sliced


def test_an_unknown_style_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(ConfigError, match=r"cannot cut layers\.\*\.mlp in the style moe"):
        slice_matrices(model_with({"layers.*.mlp": "moe"}), mesh)
