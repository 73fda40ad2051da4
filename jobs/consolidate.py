"""Makes one Hugging Face folder of the newest sharded checkpoint: whole weights, merged adapters, config and tokenizer."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from conf.errors import Problem, RunError
from conf.files import new_folder, read_json, write_json
from conf.schema import AdapterKind, Config, OutputDtype
from jobs import backends, checkpoint, model


def run(config: Config) -> None:
    """Write RUN/model from the newest checkpoint; does nothing when it was made from that one in that dtype.

    Raises RunError when there is no whole checkpoint, or a weight is not what training recorded of it.
    """
    found = checkpoint.latest(config)
    if found is None:
        raise RunError(Problem("checkpoints", checkpoint.folder(config), "has no whole checkpoint: train first"))
    path, about = found
    target = Path(config.run_dir) / "model"
    dtype = (
        config.train.precision.name if config.consolidate.dtype is OutputDtype.auto else config.consolidate.dtype.name
    )
    made = {"checkpoint": path.name, "dtype": dtype, "digest": about["config"]}
    if read_json(target / "muster.json") == made:
        print(f"model is there already: {target}")
        return
    print(f"reading {path}, written by {about['layout']} on {about['world_size']} ranks", flush=True)
    weights = backends.chosen(config).consolidate(path)
    _verify(weights, path)
    whole = _assemble(config, weights).to(model.DTYPES[dtype])
    _retire(target)
    with new_folder(target) as beside:
        whole.save_pretrained(beside, max_shard_size=int(config.consolidate.shard_gib * 2**30))
        model.tokenizer(config).save_pretrained(beside)
        write_json(beside / "muster.json", made)
    print(f"model     {target}", flush=True)


def _verify(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Compare with the SHA-256 of the live weights, where training left them."""
    prints = read_json(path / "fingerprint.json")
    if prints is None:
        return
    wrong = [
        name
        for name, expected in prints.items()
        if name not in weights or checkpoint.fingerprint(weights[name]) != expected
    ]
    if wrong:
        raise RunError(
            Problem(
                "checkpoint",
                path,
                f"{len(wrong)} of {len(prints)} weights differ from those in training, {wrong[0]} first: "
                "the files have changed or been damaged; delete this checkpoint to go back to the one before",
            )
        )
    print(f"{len(prints)} weights equal those in training, bit for bit", flush=True)


def _assemble(config: Config, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model with these weights; adapters are added into the base. Raises RunError when a weight has no place or is missing."""
    built = model.build(config)
    adapter = config.adapter.kind is not AdapterKind.none
    expected = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    missing, unexpected = sorted(expected - weights.keys()), sorted(weights.keys() - built.state_dict().keys())
    if missing or unexpected:
        raise RunError(
            Problem(
                "checkpoint", config.run_dir, f"does not fit the model: missing {missing[:3]}, unknown {unexpected[:3]}"
            )
        )
    built.load_state_dict(weights, strict=False)
    whole = built.merge_and_unload() if adapter else built
    whole.config.use_cache = True
    if whole.generation_config is None:
        whole.generation_config = GenerationConfig.from_model_config(whole.config)
    return whole


def _retire(target: Path) -> None:
    """Move a model of an older checkpoint aside, so that the new one can be published by rename."""
    if target.exists():
        number = 1
        while (aside := target.with_name(f"model.{number}")).exists():
            number += 1
        target.rename(aside)
        print(f"the model that was there is now {aside}")
