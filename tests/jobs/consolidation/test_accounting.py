"""Every tensor of a checkpoint is used or known to be something else, and the base serves only what was frozen; else no merge."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conf.errors import UserError
from conf.files import read_json, write_json
from jobs.consolidation import external, prefixes
from jobs.model import saved_names
from jobs.tensor_io import model_files, safetensors
from tests.jobs import shards

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return shards.base("gqa", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return shards.base("tied", tmp_path_factory.mktemp("base"))


def weights(name="gqa"):
    """What training made of the base."""
    return {key: value + 0.01 for key, value in shards.build(name).state_dict().items()}


def dcp_folder(state, folder):
    dcp.save({key: value.clone() for key, value in state.items()}, checkpoint_id=folder, no_dist=True)
    return folder


def files(tensors, path):
    path.parent.mkdir(exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata={"format": "pt"})
    return path.parent


def merge(checkpoint, out, *words):
    external.main([str(checkpoint), "--out", str(out), "--dtype", "fp32", *map(str, words)])
    return {name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()}


def refused(checkpoint, out, message, *words) -> None:
    with pytest.raises(UserError, match=message):
        merge(checkpoint, out, *words)
    assert not out.exists()


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


# The base


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "original"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_the_base_does_not_serve_what_was_trained(name, dtype, base, tmp_path) -> None:
    state = weights()
    del state[name]
    folder = dcp_folder(state, tmp_path / "ck")
    message = rf"1 weights missing \['{name}'\].*copy or save the checkpoint with all of its weights"
    refused(folder, tmp_path / "out", message, "--base", base, "--dtype", dtype)


def test_half_a_model_is_not_called_verified(base, tmp_path, capsys) -> None:
    """Without a model to compare with, nobody knows what is missing."""
    half = {name: value for name, value in weights().items() if "layers.1" not in name}
    merge(dcp_folder(half, tmp_path / "ck"), tmp_path / "out")
    assert read_json(tmp_path / "out/muster.json")["verified"] is False
    assert "not verified: whether these are all weights of a model is known only with --base" in capsys.readouterr().out
    refused(tmp_path / "ck", tmp_path / "with", "12 weights missing", "--base", base)


# Tied weights


def test_a_head_that_differs_from_the_embedding_is_written(tied, tmp_path, capsys) -> None:
    state = weights("tied")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"][-1, -1] += 0.5
    found = merge(dcp_folder(state, tmp_path / "ck"), tmp_path / "out", "--base", tied)
    assert equal(found, state) and "two different weights are stored" in capsys.readouterr().out
    assert read_json(tmp_path / "out/config.json")["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize("left_out", ["", "lm_head.weight", "model.embed_tokens.weight"])
def test_one_weight_under_two_names_is_written_once(left_out, tied, tmp_path) -> None:
    state = weights("tied")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    wanted = {name: value for name, value in state.items() if name != "lm_head.weight"}
    state.pop(left_out, None)
    found = merge(dcp_folder(state, tmp_path / "ck"), tmp_path / "out", "--base", tied)
    assert equal(found, wanted) and read_json(tmp_path / "out/config.json")["tie_word_embeddings"] is True


# Which tensors are the weights


OTHER_STATE = [
    "optimizer.state.{}.exp_avg", "optim.state.{}.exp_avg_sq", "optimizer_state.{}.momentum_buffer", "{}.exp_avg",
    "{}.momentum_buffer", "train_state.ntokens_seen", "lr_scheduler.last_epoch",
]  # fmt: skip


@pytest.mark.parametrize("words", [[], ["--base"]], ids=["alone", "with-base"])
def test_state_of_the_optimizer_is_not_written(words, base, tmp_path) -> None:
    state = weights()
    more = {pattern.format(name): torch.ones(3) for pattern in OTHER_STATE for name in state}
    folder = dcp_folder({f"model.{name}": value for name, value in state.items()} | more, tmp_path / "ck")
    if not words:  # names like `model.layers...` are not known to be without a prefix of their own
        folder = dcp_folder(state | more, tmp_path / "plain")
    assert equal(merge(folder, tmp_path / "out", *words, *([base] if words else [])), state)


@pytest.mark.parametrize(("first", "second"), [("model.", "ema."), ("", "ema_model."), ("model.", "model_ema.")])
def test_two_sets_of_weights_are_refused_and_the_remedy_works(first, second, base, tmp_path) -> None:
    state, older = weights(), shards.build("gqa").state_dict()
    both = {first + name: value for name, value in state.items()} | {
        second + name: value for name, value in older.items()
    }
    folder = dcp_folder(both, tmp_path / "ck")
    refused(folder, tmp_path / "out", "not the weights of the model.*--prefix=", "--base", base)
    refused(folder, tmp_path / "out", "not the weights of the model.*--prefix=")
    found = merge(folder, tmp_path / "averaged", "--base", base, "--prefix", second)
    assert equal(found, dict(older))
    if first:
        assert equal(merge(folder, tmp_path / "out", "--base", base, "--prefix", first), state)
    refused(folder, tmp_path / "no", "--prefix=nothing.: is before no name", "--prefix", "nothing.")


def test_a_copy_beside_each_weight_is_refused(base, tmp_path) -> None:
    state = weights()
    folder = dcp_folder(state | {f"{name}_ema": value for name, value in state.items()}, tmp_path / "ck")
    refused(folder, tmp_path / "out", "0 weights missing.*27 unknown", "--base", base)
    refused(folder, tmp_path / "out", "holds 27 tensors that are not the weights")


def test_one_name_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"holds a\.weight twice"):
        prefixes.strip_prefixes({"a.weight": 1, "_orig_mod.a.weight": 2})


def test_the_names_of_files_are_known_in_a_checkpoint(tmp_path) -> None:
    """Mixtral with one weight per expert, as transformers 4 trained it and the Hub has it."""
    base = shards.base("mixtral", tmp_path)
    saved = {name: value + 0.01 for name, value in load_file(base / "model.safetensors").items()}
    assert any("experts.3.w2" in name for name in saved)
    assert equal(merge(dcp_folder(saved, tmp_path / "ck"), tmp_path / "out", "--base", base), saved)
    del saved["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    refused(dcp_folder(saved, tmp_path / "less"), tmp_path / "no", r"1 weights missing.*experts\.3\.w2", "--base", base)


def test_names_of_files_need_no_model_that_can_be_streamed(tmp_path, monkeypatch) -> None:
    def refuse(_):
        raise saved_names.CannotStream("turned")

    base = shards.base("mixtral", tmp_path)
    saved = {name: value + 0.01 for name, value in load_file(base / "model.safetensors").items()}
    monkeypatch.setattr(external, "blueprint_of_model", refuse)
    assert equal(merge(dcp_folder(saved, tmp_path / "ck"), tmp_path / "out", "--base", base), saved)
    live = dcp_folder(shards.build("mixtral").state_dict(), tmp_path / "live")
    refused(live, tmp_path / "no", r"cannot be streamed \(turned\)", "--base", base)
    del saved["model.norm.weight"]
    refused(dcp_folder(saved, tmp_path / "less"), tmp_path / "no", r"1 weights missing \['model\.norm", "--base", base)


# Which files are the model


def test_shards_of_ranks_are_not_a_model(base, tmp_path) -> None:
    state = weights()
    for rank in range(2):
        part = {name: value[rank::2] for name, value in state.items()}
        files(part, tmp_path / f"ck/shard-0000{rank}-model-00001-of-00001.safetensors")
    refused(tmp_path / "ck", tmp_path / "out", "has 2 safetensors files .* join the shards of ranks")
    refused(tmp_path / "ck", tmp_path / "out", "has 2 safetensors files", "--base", base)
    one = files({name: value[::2] for name, value in state.items()}, tmp_path / "one/shard-0.safetensors")
    refused(one, tmp_path / "out", "unknown or of another shape", "--base", base)


def test_files_beside_a_model_are_not_taken_for_weights(base, tmp_path) -> None:
    state = weights()
    files(state, tmp_path / "ck/weights.safetensors")
    assert equal(merge(tmp_path / "ck", tmp_path / "first", "--base", base), state)
    files({"exp_avg": torch.ones(3)}, tmp_path / "ck/optimizer.safetensors")
    refused(tmp_path / "ck", tmp_path / "out", "has 2 safetensors files", "--base", base)
    (tmp_path / "ck/weights.safetensors").rename(tmp_path / "ck/model.safetensors")
    assert equal(merge(tmp_path / "ck", tmp_path / "second", "--base", base), state)


def test_numbered_files_are_all_there(base, tmp_path) -> None:
    state = weights()
    for number in (1, 2, 3):
        part = {name: value for at, (name, value) in enumerate(state.items()) if at % 3 == number - 1}
        files(part, tmp_path / f"ck/model-0000{number}-of-00003.safetensors")
    assert equal(merge(tmp_path / "ck", tmp_path / "first", "--base", base), state)
    (tmp_path / "ck/model-00002-of-00003.safetensors").unlink()
    refused(tmp_path / "ck", tmp_path / "out", "lacks 1 of 3 files, first number 2: copy them too")


def test_one_tensor_in_two_files_is_refused(tmp_path) -> None:
    for number in (1, 2):
        files({"a": torch.ones(number)}, tmp_path / f"ck/model-0000{number}-of-00002.safetensors")
    with pytest.raises(UserError, match=r"a is in model-00001-of-00002\.safetensors and in model-00002"):
        safetensors.find_tensors(tmp_path / "ck")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "deeper/x.safetensors", ".."])
def test_an_index_does_not_point_outside_its_folder(name, tmp_path) -> None:
    files({"a": torch.ones(3)}, tmp_path / "secret.safetensors")
    files({"b": torch.ones(3)}, tmp_path / "ck/x.safetensors")
    write_json(tmp_path / "ck/model.safetensors.index.json", {"weight_map": {"a": name}})
    refused(tmp_path / "ck", tmp_path / "out", "which is not in the folder of the model: write plain file names")
    with pytest.raises(UserError, match="which is not in the folder of the model"):
        model_files.weight_files(tmp_path / "ck")


def test_metadata_does_not_point_outside_its_folder(tmp_path) -> None:
    folder = dcp_folder({"a": torch.ones(3)}, tmp_path / "ck")
    (folder / "__0_0.distcp").rename(tmp_path / "stolen.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../stolen.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, tmp_path / "out", r"names \.\./stolen\.distcp, which is outside its folder")


# Quantized weights


@pytest.mark.parametrize(
    "tensors",
    [
        {"q.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "q.weight_scale_inv": torch.ones(1, 1)},
        {"q.weight": torch.ones(8, 1, dtype=torch.uint8), "q.weight.absmax": torch.ones(1)},
        {"q.qweight": torch.ones(4, 4, dtype=torch.int32), "q.scales": torch.ones(4, dtype=torch.float16)},
    ],
    ids=["fp8", "bitsandbytes", "gptq"],
)
def test_quantized_weights_are_not_cast_without_their_scales(tensors, tmp_path) -> None:
    folder = files({"norm.weight": torch.ones(4)} | tensors, tmp_path / "ck/model.safetensors")
    refused(folder, tmp_path / "out", "belongs to quantized weights.*--dtype original", "--dtype", "bf16")
    found = merge(folder, tmp_path / "kept", "--dtype", "original")
    assert all(found[name].dtype is value.dtype for name, value in tensors.items())


@pytest.mark.parametrize("dtype", ["bf16", "original"])
def test_an_fp8_base_does_not_serve_its_weights(dtype, base, tmp_path) -> None:
    """Under an adapter; and where `original` would give a checkpoint its dtype."""
    stored, folder = load_file(base / "model.safetensors"), tmp_path / "base"
    name = "model.layers.0.mlp.up_proj.weight"
    quantized = {name: stored[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    files(stored | quantized, folder / "model.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    live = get_peft_model(shards.build("gqa"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    live.save_pretrained(tmp_path / "adapter")
    message = "cannot serve weights, because .* belongs to quantized weights: name the same model in bf16"
    refused(tmp_path / "adapter", tmp_path / "out", message, "--base", folder, "--dtype", dtype)
    merge(tmp_path / "adapter", tmp_path / "remedy", "--base", base, "--dtype", dtype)
    checkpoint = dcp_folder(weights(), tmp_path / "ck")
    if dtype == "original":
        message = "up_proj.weight would be cast to float8_e4m3fn without a scale"
        refused(checkpoint, tmp_path / "out", message, "--base", folder, "--dtype", dtype)
    else:
        merge(checkpoint, tmp_path / "out", "--base", folder, "--dtype", dtype)
