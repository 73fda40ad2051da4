"""The command line for checkpoints of other programs: Accelerate, Axolotl, Trainer, DeepSpeed, torchtitan, plain torch."""

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

from conf.choices import OutputDtype
from conf.errors import DataError, Problem
from conf.files import read_json
from jobs.consolidation import estimate, merge, weight_names
from jobs.consolidation import model_card as describe
from jobs.consolidation.execute import make, workers
from jobs.consolidation.merge import Merge, Settings
from jobs.consolidation.plan import plan
from jobs.consolidation.weight_names import Blueprint
from jobs.distributed import logs
from jobs.tensor_io import dtypes, safetensors
from jobs.tensor_io.dtypes import Dtype
from jobs.tensor_io.layout import Stored
from jobs.tensor_io.open_checkpoint import Checkpoint, adapter_settings, file_versions, open_checkpoint

log = logging.getLogger(__name__)


def main(words: list[str] | None = None) -> None:
    options = _parser().parse_args(words)
    logs.set_up()
    source = open_checkpoint(options.checkpoint)
    log.info(f"reading {source.folder}: {source.kind}, {len(source.tensors)} tensors")
    settings = adapter_settings(source.folder) or {}
    base = Base(options.base or settings.get("base_model_name_or_path"))
    merged = _merge(source.tensors, base, dtypes.PRECISIONS.get(options.dtype), settings)
    made = {"checkpoint": source.folder.name, "dtype": options.dtype, "digest": None, "adapter_only": False}
    shard = int(options.shard_gib * 2**30)
    todo = plan(
        merged.outputs,
        merged.sources,
        shard,
        {},
        merged.updates,
        made | {"files": file_versions(merged.sources)},
    )
    if options.plan:
        for name, size in todo.sizes.items():
            log.info(f"{name}  {size / 1e9:.2f} GB")
        log.info("\n".join(estimate.lines(todo, options.workers or workers(), options.out or source.folder)))
        return
    if options.out is None:
        raise DataError(Problem("--out", None, "name the folder to make; only --plan does without"))
    describe = partial(_describe, base=base, merged=merged, source=source, title=options.out.name)
    make(todo, options.out, options.workers or workers(), source.folder, describe, made)
    log.info(f"model     {options.out}")
    if base.source is None:
        log.info("without --base there is no config.json and no tokenizer beside the weights")


class Base:
    """The model that was trained, as far as it is given and needed."""

    def __init__(self, source: str | None) -> None:
        self.source = source
        self.folder = Path(source) if source and Path(source).is_dir() else None
        self.files: dict[str, Stored] = {}
        self.empty: Any = None
        if self.folder and any(self.folder.glob("*.safetensors")):
            self.files = safetensors.tensors(self.folder)

    def fetch(self) -> None:
        """The weights of a Hub id."""
        from jobs.tensor_io.model_files import find

        if self.folder is None and (found := find(self.source, None)):
            self.folder, self.files = found, safetensors.tensors(found)

    def blueprint(self, tensors: dict[str, Stored]) -> Blueprint:
        """From the base's files where they name the checkpoint's weights, else from its model class."""
        if self.folder:
            config = read_json(self.folder / "config.json") or {}
            shapes = {name: stored.shape for name, stored in self.files.items()}
            blue = weight_names.of_files(config, shapes)
            if blue is not None:
                found, _ = weight_names.adapters(weight_names.plain(tensors, blue.live))
                if blue.live.keys() <= found.keys() <= blue.live.keys() | blue.tied.keys():
                    return blue
        self.empty = describe.empty(self.source)
        try:
            return weight_names.blueprint(self.empty)
        except weight_names.NotViews as error:
            said = (
                f"{type(self.empty).__name__} cannot be streamed ({error}): merge it with the program that trained it"
            )
            raise DataError(Problem("--base", self.source, said)) from error


def _merge(tensors: dict[str, Stored], base: Base, dtype: Dtype | None, settings: dict[str, Any]) -> Merge:
    if base.source is None:
        return merge.as_they_are(weight_names.plain(tensors), dtype)
    blue = base.blueprint(tensors)
    found = weight_names.plain(tensors, blue.live)
    adapters = weight_names.adapters(found)[1]
    if adapters or dtype is None:
        base.fetch()
    if adapters and "lora_alpha" not in settings:
        said = "is not beside the checkpoint: the adapter's alpha stands in it"
        raise DataError(Problem("adapter_config.json", None, said))
    scaled = Settings(
        float(settings.get("lora_alpha", 1)), bool(settings.get("use_rslora")), settings.get("alpha_pattern") or {}
    )
    return merge.merged(blue, found, base.files if adapters or dtype is None else {}, dtype, scaled)


def _describe(folder: Path, base: Base, merged: Merge, source: Checkpoint, title: str) -> None:
    if base.empty is not None:
        describe.write_model(folder, base.empty, merged)
    elif base.folder is not None:
        describe.copy_model(folder, base.folder, merged.dtype())
    places = [source.folder, source.folder.parent, *([base.folder] if base.folder else [])]
    describe.copy_tokenizer(folder, places)
    rows = {"base model": base.source, "checkpoint": source.folder.name, "format": source.kind}
    describe.write_card(folder, title, rows, base.source, "transformers")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.consolidate",
        description="Makes one Hugging Face folder of a sharded checkpoint, whoever wrote it. The format is recognised: "
        "torch DCP (.metadata, *.distcp; Accelerate's pytorch_model_fsdp_0), DeepSpeed ZeRO-1, 2, 3 (`latest`, "
        "*_optim_states.pt), a PEFT adapter folder, or safetensors. Nothing of the checkpoint is executed or changed.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, help="folder to make; one that is there is moved aside")
    parser.add_argument(
        "--base", help="folder or Hub id of the model: its config and tokenizer, the names to expect, an adapter's base"
    )
    parser.add_argument(
        "--dtype", choices=[item.name for item in OutputDtype if item is not OutputDtype.auto], default="bf16",
        help="of the result (default: bf16); `original` is the base's own",
    )  # fmt: skip
    parser.add_argument("--shard-gib", type=float, default=5.0, help="largest file, in GiB (default: 5)")
    parser.add_argument("--workers", type=int, help="threads (default: one a CPU, at least 4)")
    parser.add_argument(
        "--plan", action="store_true", help="say what would be read and written, in what memory and time, and stop"
    )
    return parser
