"""Compares a merged model with PEFT's own model, base and adapter unmerged: their logits, or layers if memory is short."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conf.errors import Problem, RunError
from jobs.consolidation import layer_check
from jobs.consolidation.adapter_layers import NAME
from jobs.consolidation.merge import Merge
from jobs.consolidation.updates import read_tensor
from jobs.consolidation.weight_names import AGAIN, BASE, split_names
from jobs.distributed import host_memory
from jobs.evaluation.reference_logits import MAX_BYTES, MEMORY_SHARE, TOLERANCE, difference
from jobs.model import multimodal, stored_quantization
from jobs.tensor_io.reader import OpenFiles, Reader

log = logging.getLogger(__name__)

TOKENS = 16


def compare_with_peft(
    folder: Path, merge: Merge, build_live: Callable[[], Any], name: Callable[[str], str] = str
) -> None:
    """Compare the model in `folder` with PEFT's model of the base and the adapter: `build_live` makes it, in fp32, without weights
    of the adapter. `name` gives the name in `merge` for one in that model.

    Where both models do not fit into memory, some layers are compared. Raises RunError if they differ by more than rounding.
    """
    needed = 2 * sum(output.numel * 4 for output in merge.outputs)
    free = host_memory.free_bytes()
    if needed > min(MAX_BYTES, MEMORY_SHARE * free):
        layers = layer_check.compare_layers(folder, merge)
        said = f"verified  {layers} adapted layers equal PEFT's; logits" if layers else "logits"
        sizes = f"two models in fp32 need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        log.info(f"{said} not compared: {sizes}")
        return
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        live = _with_adapter(build_live(), merge, name)
        tokens = sample_tokens(live.config)
        expected = live(input_ids=tokens, use_cache=False).logits[0]
        del live
        from transformers import AutoConfig

        auto_class = multimodal.auto_class(AutoConfig.from_pretrained(folder))
        merged, problems = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        actual = merged.eval()(input_ids=tokens, use_cache=False).logits[0]
    wrong = {key: {str(item) for item in names} for key, names in problems.items()}
    wrong["unexpected_keys"] = {item for item in wrong["unexpected_keys"] if item not in merge.copied}
    if found := {key: sorted(names)[:3] for key, names in wrong.items() if names}:
        message = f"does not load as it was written: {found}; it is not published"
        raise RunError(Problem("model", folder, message))
    check_logits(actual, expected, folder, merge.main_dtype().torch)


def check_logits(actual: torch.Tensor, expected: torch.Tensor, folder: Path, dtype: torch.dtype) -> None:
    """Raise RunError unless they agree within the tolerance of a dtype."""
    largest, tolerance = difference(actual, expected), TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if not largest <= tolerance:  # written so that NaN is refused too
        message = (
            f"logits differ by {largest:.2g} of their spread from those of the base with its adapter, but rounding explains only "
            f"{tolerance:g}: this is not the model that was trained, so it is not published"
        )
        raise RunError(Problem("model", folder, message))
    log.info(
        f"verified  logits at {len(actual)} positions differ by {largest:.2g} of their spread from PEFT's ({tolerance:g} allowed)"
    )


def live_model(base: Path, settings: dict[str, Any]) -> Any:
    """PEFT's model of a base in a folder and adapter_config.json; `init_lora_weights` changes the base as in training."""
    from peft import LoraConfig, get_peft_model

    model = stored_quantization.from_pretrained(str(base), None, torch.float32)
    config = LoraConfig.from_peft_type(**{**settings, "inference_mode": True})  # type: ignore[no-untyped-call] # PEFT's
    return get_peft_model(model, config)


def _with_adapter(live: Any, merge: Merge, name_in_merge: Callable[[str], str]) -> Any:
    """The model with everything that the checkpoint has of it."""
    own = {name: key for key, name in _names_in_peft(merge).items()}
    files = OpenFiles()
    try:
        reader = Reader(files)
        for name, parameter in live.named_parameters(remove_duplicate=False):
            key = own.get(_canonical(name_in_merge(name)))
            if key is not None:
                parameter.data.copy_(read_tensor(reader, merge.sources[key]).view(parameter.shape))
    finally:
        files.close()
    return live.eval()


def _names_in_peft(merge: Merge) -> dict[str, str]:
    """Name in the checkpoint -> canonical name."""
    names = split_names(key for key in merge.sources if not key.startswith((BASE, AGAIN)))
    found = {key: f"{module}.{kind}" for module, kinds in names.adapters.items() for kind, key in kinds.items()}
    return found | {key: name for name, key in names.whole.items()}


def _canonical(name: str) -> str:
    names = split_names([name])
    if names.adapters:
        ((module, kinds),) = names.adapters.items()
        return f"{module}.{next(iter(kinds))}"
    return next(iter(names.whole), f"{NAME}:frozen")


def sample_tokens(config: Any) -> torch.Tensor:
    """A row of random tokens, always the same."""
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, TOKENS), generator=generator)
