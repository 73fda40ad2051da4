"""The way of models whose saved weights are no runs of their live ones: everything in memory, written by transformers."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from conf.choices import AdapterKind, Frozen, MergeBase
from conf.errors import DataError, Problem, RunError
from conf.files import new_folder, write_json
from conf.schema import Config
from jobs.checkpoint import checkpointing
from jobs.consolidation import weight_names
from jobs.consolidation.execute import retire
from jobs.consolidation.merge import tensor
from jobs.model import build
from jobs.tensor_io.open_checkpoint import Checkpoint
from jobs.tensor_io.reader import Files, Reader
from jobs.tokenization.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def run(
    config: Config,
    source: Checkpoint,
    target: Path,
    made: dict[str, Any],
    prints: dict[str, str],
    compare: Callable[[Path], None],
) -> None:
    """Write `target`, once `compare` has looked at it. Raises DataError when the checkpoint does not fit the model, RunError
    when it is not what was trained."""
    if config.consolidate.base is MergeBase.dequantised:
        said = f"cannot be had of {config.model.source}, which is merged in memory: take original"
        raise DataError(Problem("consolidate.base", "dequantised", said))
    adapter = replace(config.adapter, base=Frozen.full)  # the stored weights are what is merged into
    built = build.build(replace(config, adapter=adapter))
    files = Files()
    try:
        reader = Reader(files)
        live = [name for name, _ in built.named_parameters()]
        found = {name: tensor(reader, stored) for name, stored in weight_names.plain(source.tensors, live).items()}
    finally:
        files.close()
    expected = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    missing, unknown = sorted(expected - found.keys()), sorted(found.keys() - built.state_dict().keys())
    if missing or unknown:
        said = f"does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}"
        raise DataError(Problem("checkpoint", source.folder, said))
    for name, expected_print in prints.items():
        if name not in found or checkpointing.fingerprint(found[name]) != expected_print:
            said = f"weight {name} differs from that in training: delete this checkpoint to go back to the one before"
            raise RunError(Problem("checkpoint", source.folder, said))
    built.load_state_dict(found, strict=False)
    done = built.merge_and_unload() if config.adapter.kind is not AdapterKind.none else built
    if made["dtype"] in build.DTYPES:
        done = done.to(build.DTYPES[made["dtype"]])
    done.config.use_cache = True
    if done.generation_config is None:
        done.generation_config = GenerationConfig.from_model_config(done.config)
    retire(target)
    with new_folder(target) as beside:
        done.save_pretrained(beside, max_shard_size=int(config.consolidate.shard_gib * 2**30))
        load_tokenizer(config).save_pretrained(beside)
        compare(beside)
        write_json(beside / "muster.json", made | {"verified": True})
    log.info(f"model     {target}")
