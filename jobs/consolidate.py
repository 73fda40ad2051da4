"""Makes one Hugging Face folder of a sharded checkpoint, as a stream: whole weights, merged adapters, config and tokenizer.

python -m jobs consolidate RUN/config.yaml                          of a run
python -m jobs.consolidate CHECKPOINT --out FOLDER --base MODEL     of anybody's FSDP or DeepSpeed checkpoint
"""

import logging
import sys
from pathlib import Path
from typing import Any

from conf.choices import AdapterKind, Frozen, Init, MergeBase, OutputDtype, Verify
from conf.errors import Problem, RunError, UserError
from conf.files import read_json
from conf.schema import Config
from jobs.checkpoint import manifest
from jobs.consolidation import external, merge, model_card, weight_names
from jobs.consolidation.execute import make, workers
from jobs.consolidation.merge import Merge, Settings
from jobs.consolidation.plan import plan
from jobs.consolidation.rank_meeting import Meeting
from jobs.consolidation.weight_names import NotViews
from jobs.tensor_io import dtypes, open_checkpoint, safetensors
from jobs.tensor_io.open_checkpoint import Source

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write RUN/model from the newest checkpoint, or the one asked for; does nothing when it was made from that in that dtype.

    Several ranks share the files of the result. Raises RunError when there is no such checkpoint, it is damaged, a weight
    (or, with `consolidate.verify=logits`, what the model says) is not what training recorded of it, or there is no room;
    DataError when the checkpoint and the model do not fit.
    """
    from jobs.checkpoint import (
        checkpointing,  # imports torch, which a merge of a foreign checkpoint does without
    )

    found = checkpointing.to_consolidate(config)
    if found is None:
        raise RunError(Problem("checkpoints", checkpointing.folder(config), "has no whole checkpoint: train first"))
    path, about = found
    target = Path(config.run_dir) / "model"
    made = _identity(config, path, about)
    if (read_json(target / "muster.json") or {}) | made | {"verified": True} == read_json(target / "muster.json"):
        log.info(f"model is there already: {target}")
        return
    log.info(f"reading {path}, written by {about['layout']} on {about['world_size']} ranks")
    prints, threads = _prints(path), workers(config.cluster.cpu.cpus_per_rank)
    source = open_checkpoint.source(path)
    empty = model_card.of_run(config)
    try:
        merged = _merge(config, source, empty, made["dtype"])
    except NotViews as error:
        log.info(f"{type(empty).__name__} cannot be streamed ({error}): it is merged in memory")
        if not Meeting(target).alone:
            said = "is merged in memory, by one process: set cluster.cpu.nodes=1 and cluster.cpu.ranks_per_node=1"
            raise RunError(Problem("model.source", config.model.source, said)) from error
        from jobs.consolidation import in_memory  # imports transformers

        if not prints:
            manifest.check(path, threads)
        in_memory.run(config, source, target, made, prints, lambda folder: _compare(config, path, folder))
        return
    if missing := sorted(prints.keys() - merged.sources.keys()):
        said = f"lacks {len(missing)} of {len(prints)} weights that training recorded, {missing[0]} first"
        raise RunError(Problem("checkpoint", path, f"{said}: delete it to go back to the one before"))
    todo = plan(
        merged.outputs,
        merged.sources,
        int(config.consolidate.shard_gib * 2**30),
        prints,
        merged.updates,
        made | {"files": open_checkpoint.manifest(merged.sources)},
        "adapter_model" if config.consolidate.adapter_only else "model",
        merged.packed,
    )

    def rest(folder: Path) -> None:
        _describe(config, folder, empty, merged, about)
        _compare(config, path, folder)

    # with fingerprints each weight is compared with what training had, and needs no other check
    make(todo, target, threads, path, rest, made, None if prints else manifest.Pieces(path).check)
    log.info(f"model     {target}")


def _identity(config: Config, path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What tells one result of a run from another."""
    asked = config.consolidate.dtype
    return {
        "checkpoint": path.name,
        "dtype": config.train.precision.name if asked is OutputDtype.auto else asked.name,
        "digest": about["config"],
        "adapter_only": config.consolidate.adapter_only,
        "base": config.consolidate.base.name,
        "verify": config.consolidate.verify.name,
    }


def _merge(config: Config, source: Source, empty: Any, name: str) -> Merge:
    """What goes into the result. Raises NotViews for a model that cannot be streamed."""
    from jobs.model import build, quantized_linear
    from jobs.tensor_io.model_files import find

    dtype, adapter = merge.DTYPES.get(name), config.adapter.kind is not AdapterKind.none
    found = weight_names.plain(source.tensors, empty.state_dict())
    if config.consolidate.adapter_only:
        return merge.adapter_alone(found, dtype)
    base = {}
    if config.model.init is Init.pretrained and (adapter or dtype is None):
        folder = find(config.model.source, config.model.revision)
        if folder is None and adapter:
            raise NotViews(f"{config.model.source} has no safetensors files")
        base = safetensors.tensors(folder) if folder else {}
    settings = Settings(config.adapter.alpha, config.adapter.rslora) if adapter else None
    blue = weight_names.blueprint(empty)
    made = merge.merged(blue, found, base, dtype, settings)
    if config.consolidate.base is MergeBase.dequantised:
        layers = quantized_linear.layers(build.skeleton(config))
        computed = str(build.compute_dtype(config)).removeprefix("torch.")
        merge.dequantised(made, blue, layers, dtypes.EVERY[computed])
    return made


def _compare(config: Config, path: Path, folder: Path) -> None:
    if config.consolidate.verify is Verify.logits:
        from jobs.evaluation import reference_logits  # imports transformers

        reference_logits.compare(config, path, folder)


def _prints(path: Path) -> dict[str, str]:
    """SHA-256 of the live weights, where training left them."""
    found = read_json(path / "fingerprint.json") or {}
    return {weight_names.WRAPPERS.sub("", name): value for name, value in found.items()}


def _describe(config: Config, folder: Path, empty: Any, merged: Merge, about: dict[str, Any]) -> None:
    """Everything beside the weights."""
    adapter = config.adapter
    source = config.model.source if config.model.init is Init.pretrained else None
    if config.consolidate.adapter_only:
        model_card.write_adapter(
            folder,
            {
                "lora_alpha": adapter.alpha,
                "lora_dropout": adapter.dropout,
                "use_rslora": adapter.rslora,
                "use_dora": adapter.dora,
            },
            merged,
            config.model.source,
        )
    else:
        model_card.write_model(folder, empty, merged)
    model_card.write_tokenizer(folder, config)
    rows = {
        "base model": source,
        "data": config.data.path or ", ".join(config.data.sets),
        "steps": about["step"],
        "layout": f"{about['layout']} on {about['world_size']} ranks",
        "adapter": _adapter(config),
        "config": about["config"],
    }
    model_card.write_card(
        folder, config.name, rows, source, "peft" if config.consolidate.adapter_only else "transformers"
    )


def _adapter(config: Config) -> str | None:
    adapter = config.adapter
    if adapter.kind is AdapterKind.none:
        return None
    kind = "DoRA" if adapter.dora else "LoRA"
    kind = f"rank-stabilised {kind}" if adapter.rslora else kind
    base = "" if adapter.base is Frozen.full else f", on a base in {adapter.base.name}"
    return f"{kind}, r {adapter.r}, alpha {adapter.alpha:g}{base}"


if __name__ == "__main__":
    try:
        external.main()
    except UserError as error:
        print(f"consolidate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
