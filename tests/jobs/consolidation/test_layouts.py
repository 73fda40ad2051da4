"""Every layout on every number of ranks, tensor by tensor compared with the results of accelerate and DeepSpeed."""

import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from jobs.consolidation import external
from tests.jobs import shards
from tests.jobs.ranks import spawn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
KINDS = ("fsdp", "both", "app", "slices", "zero1", "zero2", "zero3", "bf16_zero1", "bf16_zero3")


@pytest.fixture(
    scope="module",
    params=[2, *(pytest.param(size, marks=pytest.mark.proof) for size in (1, 3, 4, 7))],
    ids=lambda size: f"on{size}",
)
def checkpoints(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(shards.write, request.param, folder, list(shards.MODELS))
    yield folder
    shutil.rmtree(folder)


def weights(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def consolidated(checkpoint, out, *words):
    external.main([str(checkpoint), "--out", str(out), "--shard-gib", "0.0001", *map(str, words)])
    return weights(out)


def expected(folder, kind, scratch):
    """The result of accelerate or DeepSpeed: live names and fp32 tensors."""
    if "zero" in kind or "frozen" in kind:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return {name: value.detach() for name, value in get_fp32_state_dict_from_zero_checkpoint(folder / kind).items()}
    from accelerate.utils import merge_fsdp_weights

    place = "slices" if kind == "slices" else "fsdp"
    merge_fsdp_weights(str(folder / place / "pytorch_model_fsdp_0"), str(scratch))
    return weights(scratch)


def differing(found, wanted):
    assert found.keys() == wanted.keys()
    return [
        name
        for name, value in wanted.items()
        if found[name].dtype != value.dtype or not torch.equal(found[name], value)
    ]


@pytest.mark.parametrize("name", shards.MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_what_accelerate_and_deepspeed_make(name, kind, checkpoints, tmp_path) -> None:
    live = shards.build(name)
    second = getattr(live, "all_tied_weights_keys", None) or {}
    wanted = expected(checkpoints / name, kind, tmp_path / "theirs")
    wanted = {key: value for key, value in wanted.items() if key not in second}
    base = shards.base(name, tmp_path)
    saved = revert_weight_conversion(live, dict(wanted))
    found = consolidated(checkpoints / name / kind, tmp_path / "fp32", "--base", base, "--dtype", "fp32")
    assert not differing(found, saved)
    bare = consolidated(checkpoints / name / kind, tmp_path / "bare", "--dtype", "fp32")
    assert not differing({key: value for key, value in bare.items() if key not in second}, wanted)
    half = consolidated(checkpoints / name / kind, tmp_path / "bf16", "--base", base, "--dtype", "bf16")
    assert not differing(half, {key: value.to(torch.bfloat16) for key, value in saved.items()})


@pytest.mark.parametrize("kind", ["frozen2", "frozen3"])
def test_frozen_parameters_are_there(kind, checkpoints, tmp_path) -> None:
    wanted = expected(checkpoints / "gqa", kind, tmp_path)
    assert not differing(consolidated(checkpoints / "gqa" / kind, tmp_path / "out", "--dtype", "fp32"), wanted)


def test_fp32_weights_that_deepspeed_itself_cannot_read(checkpoints, tmp_path) -> None:
    """BF16_Optimizer writes no stage into its files, and zero_to_fp32 refuses them. Compared with the live optimizer instead."""
    found = consolidated(checkpoints / "odd/bf16_fp32acc", tmp_path / "out", "--dtype", "fp32")
    live = torch.load(checkpoints / "odd/live.pt")
    assert not differing({name: found[name] for name in live}, live)


@pytest.mark.parametrize("name", shards.MODELS)
def test_the_result_loads(name, checkpoints, tmp_path) -> None:
    out = tmp_path / "out"
    consolidated(checkpoints / name / "fsdp", out, "--base", shards.base(name, tmp_path), "--dtype", "fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype is torch.float32
    trained = model(input_ids=torch.arange(3, 19)[None], labels=torch.arange(3, 19)[None]).loss
    assert trained.isfinite()
