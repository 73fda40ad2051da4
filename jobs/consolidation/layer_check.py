"""Compares some adapted layers of a merged model with those that PEFT merges, one at a time: for models larger than memory."""

from pathlib import Path
from typing import Any

import torch

from conf.errors import Problem, RunError
from jobs.consolidation.adapter_layers import NAME, AdapterLayer
from jobs.consolidation.merge import Merge
from jobs.consolidation.plan import Output
from jobs.consolidation.updates import read_tensor
from jobs.consolidation.weight_names import AGAIN, BASE, split_names
from jobs.tensor_io import safetensors
from jobs.tensor_io.reader import OpenFiles, Reader

LAYERS = 4
"""The first and the last layer, and others between them at equal distances."""
MAX_ELEMENTS = 2**28
"""Of one weight: 1 GiB in fp32, of which PEFT makes a few copies."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Two units in the last place, as a share of the largest element of a row."""


def compare_layers(folder: Path, merge: Merge) -> int:
    """Returns how many layers were compared. Raises RunError if one differs by more than rounding."""
    plain = [item for item in _candidates(merge) if item[1].numel <= MAX_ELEMENTS]
    chosen = [plain[number * (len(plain) - 1) // max(1, LAYERS - 1)] for number in range(LAYERS)] if plain else []
    written, files = safetensors.find_tensors(folder), OpenFiles()
    reader = Reader(files)
    try:
        for layer, output, keys in chosen:
            parts = {kind: read_tensor(reader, merge.sources[key]) for kind, key in keys.items()}
            expected = _merged_by_peft(layer, read_tensor(reader, merge.sources[output.source]), parts)
            actual = read_tensor(reader, written[output.name])
            allowed = TOLERANCE.get(output.dtype.torch, 2**-6) * expected.abs().amax(1, keepdim=True)
            if not bool(((actual - expected).abs() <= allowed).all()):
                message = f"{output.name} is not what PEFT merges: it is not published"
                raise RunError(Problem("model", folder, message))
    finally:
        files.close()
    return len({output.name for _, output, _ in chosen})


def _candidates(merge: Merge) -> list[tuple[AdapterLayer, Output, dict[str, str]]]:
    """Linear layers whose source is one whole weight: layer, output, kind -> name in the checkpoint."""
    layers = merge.adapter.layers if merge.adapter else {}
    names = split_names(key for key in merge.sources if not key.startswith((BASE, AGAIN)))
    outputs = {merge.live_names.get(output.name, output.name): output for output in merge.outputs}
    found = []
    for module, layer in layers.items():
        output = outputs.get(layer.weight)
        is_plain = not (layer.embedding or layer.transposed or layer.init) and layer.experts == 1
        if is_plain and output and len(output.shape) == 2 and merge.sources[output.source].shape == output.shape:
            found.append((layer, output, names.adapters[module]))
    return found


def _merged_by_peft(layer: AdapterLayer, weight: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    config = LoraConfig(init_lora_weights=False, use_dora="lora_magnitude_vector" in parts)
    made: Any = Linear(linear, NAME, config, r=layer.rank, lora_alpha=layer.scale * layer.rank)  # type: ignore[arg-type]
    with torch.no_grad():
        for kind, value in parts.items():
            if kind != "lora_B.bias":
                getattr(made, kind)[NAME].weight.data = value
        made.merge()
    merged: torch.Tensor = linear.weight.detach()
    return merged
