"""A QLoRA config of Axolotl with its DeepSpeed JSON (ZeRO-3, offloaded) runs from `import` to answers on two real nodes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CONFIG = runs.CLONE / "tests/launcher/convert/configs/axolotl-qlora-zero3.yml"
TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
SMALLER = [
    "data.max_length=128", "train.global_batch=16", "train.epochs=null", "train.steps=4", "train.warmup_steps=1",
    "train.eval_every=2", "train.tf32=false", "cluster.offline=true", "generate.max_new_tokens=4",
]  # fmt: skip
"""What a tiny model on CPUs needs otherwise."""


def tiny_llama(folder: Path) -> Path:
    """A Llama with random weights, and a tokenizer with the tokens of Llama 3's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(runs.CLONE / "examples/tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_runs_whole(slurm: Cluster, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base, run, experiment = tiny_llama(tmp_path / "base"), tmp_path / "run", tmp_path / "imported.yaml"
    done = runs.command("import", CONFIG, "--out", experiment, "--gpus", 4)
    assert done.returncode == 0 and " 0 refused" in done.stdout, done.stdout + done.stderr

    words = [f"model.source={base}", f"data.path={tmp_path}/rows.jsonl", "pipeline=finetune"]
    runs.complete(run, str(experiment), *words, *SMALLER)
    zero = json.loads((run / "deepspeed.json").read_text())["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"]) == (3, "cpu")
    lines = runs.metrics(run)
    assert lines[-1]["step"] == 4 and lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    trained = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name, weight in trained.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}  # lora_target_linear
    assert len(json.loads((run / "generations.json").read_text())["answers"]) == 4
    assert json.loads((run / "evaluate.json").read_text())["loss"] == pytest.approx(lines[-1]["eval_loss"], rel=0.01)
