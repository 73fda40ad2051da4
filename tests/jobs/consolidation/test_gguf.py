"""The merged folder converts to GGUF with llama.cpp's own converter, which lies in the source package of llama-cpp-python."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import ranks
from tests.jobs.curves import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.proof]
PACKAGE = "llama-cpp-python"
CONVERTER = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")
CONVERT = """
import runpy, sys
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
"""The converter knows tokenizers by a hash of some tokens, and the small one of the demo is not among them."""
READ = """
import json, sys
from gguf import GGUFReader
reader = GGUFReader(sys.argv[1])
print(json.dumps({item.name: [list(map(int, item.shape)), item.data.flatten().tolist()] for item in reader.tensors}))
"""
NAMES = {
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
}
"""Weights that llama.cpp stores as they are; it permutes the rows of q_proj and k_proj."""


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the converter and what it needs can be imported; CONVERTER is its folder."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = [*pip, "download", "--no-deps", "--no-binary", PACKAGE, PACKAGE, "--dest", folder]
    needed = [*pip, "install", "--no-deps", "--target", folder / "needed", "sentencepiece", "gguf"]
    for command in (source, needed):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"{PACKAGE} and gguf cannot be downloaded here")
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        wanted = [
            item for item in tar.getmembers() if any(f"vendor/llama.cpp/{part}" in item.name for part in CONVERTER)
        ]
        tar.extractall(folder, members=wanted, filter="data")
    [found] = folder.glob("*/vendor/llama.cpp")
    path = f"{found}:{found}/gguf-py:{folder}/needed"
    return {**os.environ, "PYTHONPATH": path, "CONVERTER": str(found)}


def test_the_merged_folder_converts(converter: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks.run(
        f"run_dir={run}",
        *SMALL,
        "cluster.train.ranks_per_node=1",
        "train.steps=3",
        "jobs=[preprocess,train,consolidate]",
    )
    script, out = f"{converter['CONVERTER']}/convert_hf_to_gguf.py", tmp_path / "model.gguf"
    words = [sys.executable, "-c", CONVERT, script, run / "model", "--outfile", out, "--outtype", "f32"]
    done = subprocess.run(words, env=converter, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([sys.executable, "-c", READ, out], env=converter, capture_output=True, text=True, check=True)
    converted, ours = json.loads(done.stdout), load_file(run / "model/model.safetensors")
    assert len(converted) == len(ours)
    embedding = converted["token_embd.weight"]
    assert torch.equal(torch.tensor(embedding[1]), ours["model.embed_tokens.weight"].flatten())
    for name, theirs in NAMES.items():
        weight = ours[f"model.layers.1.{name}.weight"]
        shape, values = converted[f"blk.1.{theirs}.weight"]
        assert shape == list(reversed(weight.shape))
        assert torch.equal(torch.tensor(values), weight.flatten()), name
