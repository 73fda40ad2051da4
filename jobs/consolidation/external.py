"""The command line that merges checkpoints of other programs: Accelerate, Axolotl, Trainer, DeepSpeed, torchtitan, plain torch."""

import argparse
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.choices import OutputDtype
from conf.errors import DataError, Problem
from jobs.consolidation import estimate, model_card, quantized
from jobs.consolidation.execute import execute, worker_count
from jobs.consolidation.merge import Merge, adapter_weights_from_base, merge_model, merge_without_base
from jobs.consolidation.plan import make_plan
from jobs.consolidation.prefixes import strip_prefixes
from jobs.consolidation.weight_names import (
    Blueprint,
    blueprint_of_files,
    blueprint_of_model,
    blueprint_of_names,
    is_from_base,
    split_names,
)
from jobs.distributed import logs
from jobs.model.saved_names import CannotStream
from jobs.tensor_io.dtypes import PRECISIONS, Dtype
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.open_checkpoint import Checkpoint, adapter_settings, file_versions, open_checkpoint
from jobs.tensor_io.untrusted import read_object

if TYPE_CHECKING:
    from jobs.consolidation.adapter_layers import AdapterPlan

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Raises UserError for everything that the user can correct."""
    options = parser().parse_args(arguments)
    logs.set_up()
    merge_checkpoint(options, open_checkpoint(options.checkpoint))


def merge_checkpoint(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Merge an opened checkpoint by the options that `parser` has read. Raises UserError as `main` does."""
    log.info(f"reading {checkpoint.folder}: {checkpoint.kind}, {len(checkpoint.tensors)} tensors")
    settings = adapter_settings(checkpoint.folder) or {}
    base = Base(options.base or _named_base(settings))
    dtype = PRECISIONS.get(options.dtype)  # None for `original`
    if checkpoint.kind == "safetensors" and (dtype is not None or base.source is not None):
        checkpoint = replace(checkpoint, tensors=quantized.dequantized(checkpoint.tensors, checkpoint.folder))
    merge = _merge(checkpoint, base, dtype, settings, options.prefix)
    muster_json = {
        "checkpoint": checkpoint.folder.name, "dtype": options.dtype, "digest": None, "adapter_only": False,
    }  # fmt: skip
    plan = make_plan(
        merge.outputs,
        merge.sources,
        shard_bytes=int(options.shard_gib * 2**30),
        updates=merge.updates,
        rounded=merge.rounded,
        identity=muster_json | {"files": file_versions(merge.sources)},
    )
    threads = options.workers or worker_count()
    if options.plan:
        for name, size in plan.sizes.items():
            log.info(f"{name}  {size / 1e9:.2f} GB")
        for line in estimate.describe(plan, threads, options.out or checkpoint.folder):
            log.info(line)
        return
    if options.out is None:
        raise DataError(Problem("--out", None, "is missing: name the folder to make, or add --plan"))

    def describe(folder: Path) -> None:
        _describe(folder, base=base, merge=merge, checkpoint=checkpoint, title=options.out.name)
        if base.adapter is not None and base.folder is not None:
            from jobs.consolidation import live_check  # imports transformers

            live_check.compare_with_peft(folder, merge, partial(live_check.live_model, base.folder, settings))

    execute(
        plan,
        options.out,
        threads=threads,
        checkpoint=checkpoint.folder,
        describe=describe,
        muster_json=muster_json,
        verified=base.source is not None,
    )
    log.info(f"model     {options.out}")
    if base.source is None:
        log.info("without --base, no config.json and no tokenizer are written beside the weights")
        log.info("not verified: whether these are all weights of a model is known only with --base")


class Base:
    """The model that was trained (`--base`), as far as it is given and needed."""

    def __init__(self, source: str | None) -> None:
        self.source = source
        self.folder = Path(source) if source and Path(source).is_dir() else None
        self.tensors: dict[str, StoredTensor] = {}
        self.empty_model: Any = None
        """The model on the meta device, if it had to be built."""
        self.adapter: AdapterPlan | None = None
        """The adapters of the checkpoint, if it has any."""
        if self.folder and any(self.folder.glob("*.safetensors")):
            self.tensors = quantized.find_dequantized(self.folder)

    def fetch_weights(self) -> None:
        """Find or download the weights of a Hub id."""
        from jobs.tensor_io.model_files import find_or_download

        if self.source and self.folder is None and (folder := find_or_download(self.source, None)):
            self.folder, self.tensors = folder, quantized.find_dequantized(folder)

    def blueprint(self, source: str, tensors: dict[str, StoredTensor], prefix: str | None, adapted: bool) -> Blueprint:
        """From the base's files if they name all weights of a checkpoint without adapters, else from its model class.

        Raises DataError for a model that cannot be streamed.
        """
        if self.folder and not adapted:
            config = read_object(self.folder / "config.json") or {}
            blueprint = blueprint_of_files(config, {name: stored.shape for name, stored in self.tensors.items()})
            if blueprint is not None:
                names = split_names(strip_prefixes(tensors, blueprint.names, prefix))
                known = blueprint.live.keys() | blueprint.tied.keys()
                if not names.adapters and blueprint.live.keys() <= names.whole.keys() <= known:
                    return blueprint
        self.empty_model = model_card.empty_model(source)
        try:
            return blueprint_of_model(self.empty_model)
        except CannotStream as error:
            shapes = {name: stored.shape for name, stored in self.tensors.items()}
            names = split_names(strip_prefixes(tensors, shapes, prefix))
            if (
                shapes and not names.adapters and names.whole.keys() <= shapes.keys()
            ):  # named as in the files of the base
                return blueprint_of_names(shapes)
            message = f"{type(self.empty_model).__name__} cannot be streamed ({error}): merge it with the program that trained it"
            raise DataError(Problem("--base", source, message)) from error


def _named_base(settings: dict[str, Any]) -> str | None:
    """The model that adapter_config.json names. It is logged: whoever wrote the adapter chose which files are read here."""
    name = settings.get("base_model_name_or_path")
    if name is None:
        return None
    if not isinstance(name, str) or not name.isprintable():
        message = "must be the name of a model: mend it, or give --base"
        raise DataError(Problem("base_model_name_or_path in adapter_config.json", repr(name)[:200], message))
    log.info(f"base      {name}, as adapter_config.json says; --base gives another")
    return name


def _merge(
    checkpoint: Checkpoint, base: Base, dtype: Dtype | None, settings: dict[str, Any], prefix: str | None
) -> Merge:
    if base.source is None:
        if checkpoint.excludes_frozen:
            log.info(
                "weights that were frozen may be missing (exclude_frozen_parameters): with --base they come from there"
            )
        return merge_without_base(strip_prefixes(checkpoint.tensors, prefix=prefix), dtype)
    blueprint = base.blueprint(base.source, checkpoint.tensors, prefix, bool(settings))
    weights = strip_prefixes(checkpoint.tensors, blueprint.names, prefix)
    names = split_names(weights)
    from_base: frozenset[str] = frozenset()
    if checkpoint.excludes_frozen:
        from_base = blueprint.names - names.whole.keys()
    if names.adapters or settings:
        base.adapter = _adapter(base.source, settings)
        from_base = adapter_weights_from_base(blueprint, names, base.adapter, from_base)
    needs_base = bool(from_base) or dtype is None
    if needs_base:
        base.fetch_weights()
    merge = merge_model(blueprint, weights, base.tensors if needs_base else {}, dtype, base.adapter, from_base)
    if served := sum(is_from_base(output.source) for output in merge.outputs):
        log.info(
            f"{served} of {len(merge.outputs)} weights come from the base: the checkpoint was saved without frozen weights"
        )
    if base.adapter is None and checkpoint.compute_dtype is not None:
        frozen = [output.source for output in merge.outputs if is_from_base(output.source)]
        merge.rounded = dict.fromkeys(frozen, checkpoint.compute_dtype)
    return merge


def _adapter(source: str, settings: dict[str, Any]) -> "AdapterPlan":
    from jobs.consolidation import adapter_layers  # imports torch and PEFT

    if "peft_type" not in settings:
        message = "is not beside the checkpoint: copy it there, it holds the kind and the alpha of the adapter"
        raise DataError(Problem("adapter_config.json", None, message))
    wrapped = adapter_layers.wrap(model_card.empty_model(source), settings)
    return adapter_layers.describe(
        wrapped, settings.get("init_lora_weights", True), bool(settings.get("ensure_weight_tying"))
    )


def _describe(folder: Path, *, base: Base, merge: Merge, checkpoint: Checkpoint, title: str) -> None:
    """Write the files beside the weights."""
    if base.empty_model is not None:
        model_card.write_model(folder, base.empty_model, merge)
    elif base.folder is not None:
        model_card.copy_model(folder, base.folder, merge)
    candidates = [checkpoint.folder, checkpoint.folder.parent, *([base.folder] if base.folder else [])]
    model_card.copy_tokenizer(folder, candidates)
    rows = {"base model": base.source, "checkpoint": checkpoint.folder.name, "format": checkpoint.kind}
    model_card.write_card(folder, title, rows, base.source, "transformers")


def parser() -> argparse.ArgumentParser:
    """The options of `python -m jobs.consolidate CHECKPOINT`."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.consolidate",
        description="Merges a sharded checkpoint of any program into one Hugging Face folder. It recognizes the format: "
        "torch DCP (.metadata, *.distcp; Accelerate's pytorch_model_fsdp_0), DeepSpeed ZeRO-1, 2, 3 (`latest`, "
        "*_optim_states.pt), a PEFT adapter folder, or safetensors. It does not change the checkpoint, and runs no code "
        "from it.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, help="folder to make; an existing one is renamed to OUT.1")
    parser.add_argument(
        "--base",
        help="folder or Hub id of the model that was trained: gives config, tokenizer, the expected names, and the base "
        "weights of an adapter",
    )
    parser.add_argument(
        "--dtype", choices=[item.name for item in OutputDtype if item is not OutputDtype.auto], default="bf16",
        help="dtype of the result (default: bf16); `original` keeps that of each weight in the base",
    )  # fmt: skip
    parser.add_argument(
        "--prefix",
        help="what stands before the names of the weights to merge, if a checkpoint holds several sets of them",
    )
    parser.add_argument("--shard-gib", type=float, default=5.0, help="largest file, in GiB (default: 5)")
    parser.add_argument("--workers", type=int, help="threads (default: one per CPU, at least 4, at most 32)")
    parser.add_argument("--plan", action="store_true", help="print bytes to read and write, memory and time, and stop")
    return parser
