"""The job `consolidate`: merges the shards of a checkpoint into one Hugging Face folder with config, tokenizer and model card.

python -m jobs consolidate RUN/config.yaml                          for a run of Muster
python -m jobs.consolidate CHECKPOINT --out FOLDER --base MODEL     for an FSDP or DeepSpeed checkpoint of any program
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf import precision
from conf.choices import AdapterKind, Frozen, Init, MergeBase, OutputDtype, Precision, Verify
from conf.errors import Problem, RunError, UserError
from conf.files import read_json
from conf.schema import Config
from jobs.checkpoint import manifest
from jobs.checkpoint.paths import checkpoints_folder
from jobs.consolidation import external, model_card, multimodal, of_program, quantized, weight_names
from jobs.consolidation.execute import execute, worker_count
from jobs.consolidation.merge import Merge, merge_adapter_only, merge_model, use_dequantized_base
from jobs.consolidation.plan import make_plan
from jobs.consolidation.prefixes import strip_prefixes
from jobs.consolidation.rank_coordinator import RankCoordinator
from jobs.model.saved_names import CannotStream
from jobs.tensor_io import dtypes
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.model_files import find_or_download
from jobs.tensor_io.open_checkpoint import Checkpoint, file_versions, open_checkpoint
from jobs.tensor_io.wrapper_names import without_torch_wrappers

if TYPE_CHECKING:
    from jobs.consolidation.adapter_layers import AdapterPlan

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write RUN/model from the newest checkpoint, or from `consolidate.step`. Does nothing if that model is already there.

    Several ranks share the files of the result. Raises RunError if there is no such checkpoint, if it is damaged, if a weight
    (or, with `consolidate.verify=logits`, the model's output) is not what training recorded, or if the disk is too full;
    DataError if the checkpoint does not fit the model.
    """
    if config.custom.command is not None:
        of_program.run(config)
        return
    # imports torch, which merging a checkpoint of another program may not need
    from jobs.checkpoint import checkpointing

    selected = checkpointing.select_for_consolidation(config)
    if selected is None:
        raise RunError(Problem("checkpoints", checkpoints_folder(config), "has no whole checkpoint: train first"))
    path, checkpoint_info = selected
    config.train.precision = precision.settled(config)
    target = Path(config.run_dir) / "model"
    muster_json = _muster_json(config, path, checkpoint_info)
    existing = read_json(target / "muster.json")
    if existing is not None and existing | muster_json | {"verified": True} == existing:
        log.info(f"model is there already: {target}")
        return
    log.info(f"reading {path}, written by {checkpoint_info['layout']} on {checkpoint_info['world_size']} ranks")
    threads = worker_count(config.cluster.cpu.cpus_per_rank)
    checkpoint = open_checkpoint(path)
    empty_model = model_card.empty_model_of_run(config)
    recorded = _fingerprints(path)
    fingerprints = {multimodal.names_in_result(empty_model)(name): value for name, value in recorded.items()}
    try:
        merge = _merge(config, checkpoint, empty_model, muster_json["dtype"])
    except CannotStream as error:
        log.info(f"{type(empty_model).__name__} cannot be streamed ({error}): it is merged in memory")
        if patterns := multimodal.surplus_patterns(config.model.ignore_tensors, empty_model):
            log.warning(f"tensors of {config.model.source} that match {patterns} are left out")
        _run_in_memory(config, checkpoint, path, target, muster_json, recorded, threads)
        return
    if missing := sorted(fingerprints.keys() - merge.sources.keys()):
        message = f"lacks {len(missing)} of {len(fingerprints)} weights that training recorded, first {missing[0]}"
        raise RunError(Problem("checkpoint", path, f"{message}: delete it to go back to the one before"))
    plan = make_plan(
        merge.outputs,
        merge.sources,
        shard_bytes=int(config.consolidate.shard_gib * 2**30),
        fingerprints=fingerprints,
        updates=merge.updates,
        nf4_sources=merge.nf4_sources,
        identity=muster_json | {"files": file_versions(merge.sources)},
        stem="adapter_model" if config.consolidate.adapter_only else "model",
    )

    def describe(folder: Path) -> None:
        _describe(config, folder, empty_model, merge, checkpoint_info)
        _compare_with_adapter(config, folder, merge, empty_model)
        _compare_logits(config, path, folder)

    execute(
        plan,
        target,
        threads=threads,
        checkpoint=path,
        describe=describe,
        muster_json=muster_json,
        # fingerprints compare every weight with training; without them, the bytes of the shards are checked
        check=None if fingerprints else manifest.PieceChecker(path).check,
    )
    log.info(f"model     {target}")


def _run_in_memory(
    config: Config,
    checkpoint: Checkpoint,
    path: Path,
    target: Path,
    muster_json: dict[str, Any],
    fingerprints: dict[str, str],
    threads: int,
) -> None:
    if not RankCoordinator(target).alone:
        message = "is merged in memory, by one process: set cluster.cpu.nodes=1 and cluster.cpu.ranks_per_node=1"
        raise RunError(Problem("model.source", config.model.source, message))
    from jobs.consolidation import in_memory  # imports transformers

    if not fingerprints:
        manifest.check(path, threads)
    in_memory.run(
        config,
        checkpoint,
        target,
        muster_json=muster_json,
        fingerprints=fingerprints,
        compare=lambda folder: _compare_logits(config, path, folder),
    )


def _muster_json(config: Config, path: Path, checkpoint_info: dict[str, Any]) -> dict[str, Any]:
    """What the result is made from and how. If muster.json of an existing model says the same, it is not made again."""
    dtype = config.consolidate.dtype
    return {
        "checkpoint": path.name,
        "manifest": manifest.digest(path),  # training from a chosen checkpoint may save the same step again
        "dtype": config.train.precision.name if dtype is OutputDtype.auto else dtype.name,
        "digest": checkpoint_info["config"],
        "adapter_only": config.consolidate.adapter_only,
        "base": config.consolidate.base.name,
        "verify": config.consolidate.verify.name,
    }


def _merge(config: Config, checkpoint: Checkpoint, empty_model: Any, dtype_name: str) -> Merge:
    """What goes into the result. Raises CannotStream for a model that cannot be streamed."""
    from jobs.model import build, quantized_linear
    from jobs.model.multimodal import towers, whole_of

    dtype = dtypes.PRECISIONS.get(dtype_name)  # None for `original`
    has_adapter, whole = config.adapter.kind is not AdapterKind.none, whole_of(empty_model)
    name = multimodal.names_in_result(empty_model)
    if config.consolidate.adapter_only:
        weights = strip_prefixes(checkpoint.tensors, empty_model.state_dict())
        return merge_adapter_only({name(key): stored for key, stored in weights.items()}, dtype)
    if whole is None:
        blueprint = weight_names.blueprint_of_model(empty_model)
        weights = strip_prefixes(checkpoint.tensors, blueprint.names)
    else:
        blueprint = weight_names.blueprint_of_model(whole.model, whole.text_names)
        weights = strip_prefixes(checkpoint.tensors, empty_model.state_dict())
        weights = {name(key): stored for key, stored in weights.items()}
    adapter = _adapter_plan(config) if has_adapter else None
    frozen = {name(key) for key, parameter in empty_model.named_parameters() if not parameter.requires_grad}
    if adapter is not None:
        adapter = adapter if whole is None else multimodal.rename_adapters(adapter, whole)
        frozen = (blueprint.live.keys() | blueprint.tied.keys()) - adapter.trained
    base = _base_tensors(config, needed=bool(frozen or dtype is None or whole is not None), has_adapter=has_adapter)
    if whole is None:
        merge = merge_model(blueprint, weights, base, dtype, adapter, frozen)
        if patterns := multimodal.surplus_patterns(config.model.ignore_tensors, empty_model):
            base = base or _base_tensors(config, needed=True, has_adapter=False)
            if kept := multimodal.surplus(patterns, blueprint, base):
                multimodal.copy_from_base(merge, kept)
                log.info(f"{len(kept)} tensors that training does not use stay as they are in {config.model.source}")
    else:
        text, names = multimodal.text_of_base(whole, blueprint, base)
        merge = merge_model(blueprint, weights, text, dtype, adapter, frozen)
        multimodal.name_as_in_base(merge, names)
        multimodal.copy_from_base(merge, towers(whole, base))
    if config.consolidate.base is MergeBase.dequantised:
        layers = map(name, quantized_linear.quantized_layers(build.build_on_meta(config)))
        compute_dtype = str(build.compute_dtype(config)).removeprefix("torch.")
        use_dequantized_base(merge, blueprint, set(layers), dtypes.by_name(compute_dtype))
    return merge


def _base_tensors(config: Config, *, needed: bool, has_adapter: bool) -> dict[str, StoredTensor]:
    """The stored tensors of `model.source`, if the merge needs them. Raises CannotStream if they are in another format."""
    if config.model.init is not Init.pretrained or not needed:
        return {}
    folder = find_or_download(config.model.source, config.model.revision)
    if folder is None and has_adapter:
        raise CannotStream(f"{config.model.source} has no safetensors files")
    return quantized.find_dequantized(folder) if folder else {}


def _compare_with_adapter(config: Config, folder: Path, merge: Merge, empty_model: Any) -> None:
    """Compare a merged adapter with the base and the adapter apart, if the base is the stored one."""
    if merge.adapter is not None and config.consolidate.base is not MergeBase.dequantised:
        from jobs.consolidation import live_check
        from jobs.model import build

        live_check.compare_with_peft(
            folder, merge, lambda: build.build(_on_whole_base(config)), multimodal.names_in_result(empty_model)
        )


def _on_whole_base(config: Config) -> Config:
    """The config with a new adapter on base weights in fp32."""
    adapter = dataclasses.replace(config.adapter, base=Frozen.full, source=None)
    train = dataclasses.replace(config.train, precision=Precision.fp32)
    return dataclasses.replace(config, adapter=adapter, train=train)


def _adapter_plan(config: Config) -> "AdapterPlan":
    """The adapters of the run, on weights that are not quantized."""
    from jobs.consolidation import adapter_layers
    from jobs.model import build, first_update

    plan = adapter_layers.describe(build.build_on_meta(_on_whole_base(config)), config.adapter.init.name)
    if first_update.changes_base(config):
        return adapter_layers.with_first_pairs(plan, Path(config.run_dir) / first_update.FILE)
    return plan


def _compare_logits(config: Config, path: Path, folder: Path) -> None:
    if config.consolidate.verify is not Verify.weights:
        from jobs.evaluation import reference_logits  # imports transformers

        reference_logits.compare(config, path, folder)


def _fingerprints(path: Path) -> dict[str, str]:
    """Name -> SHA-256 of each weight in fp32, if training recorded them (train.fingerprint=true)."""
    recorded = read_json(path / "fingerprint.json") or {}
    return {without_torch_wrappers(name): value for name, value in recorded.items()}


def _describe(config: Config, folder: Path, empty_model: Any, merge: Merge, checkpoint_info: dict[str, Any]) -> None:
    """Write the files beside the weights."""
    from jobs.model.multimodal import whole_of

    source = config.model.source if config.model.init is Init.pretrained else None
    if config.consolidate.adapter_only:
        model_card.write_adapter(folder, model_card.adapter_settings(config.adapter), merge, config.model.source)
    elif (whole := whole_of(empty_model)) is not None:
        base_folder = find_or_download(config.model.source, config.model.revision)
        assert base_folder is not None  # the merge has read it
        multimodal.write_config(folder, base_folder, whole.config, merge.main_dtype().name, untied=merge.untied)
    else:
        model_card.write_model(folder, empty_model, merge)
    model_card.write_tokenizer(folder, config)
    rows = {
        "base model": source,
        "data": config.data.path or ", ".join(config.data.sets),
        "steps": checkpoint_info["step"],
        "layout": f"{checkpoint_info['layout']} on {checkpoint_info['world_size']} ranks",
        "adapter": model_card.adapter_line(config.adapter),
        "config": checkpoint_info["config"],
    }
    library = "peft" if config.consolidate.adapter_only else "transformers"
    model_card.write_card(folder, config.name, rows, source, library)


if __name__ == "__main__":
    try:
        external.main()
    except UserError as error:
        print(f"consolidate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
