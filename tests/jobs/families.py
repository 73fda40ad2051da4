"""Tiny random checkpoints of model families, trained on two ranks and compared with plain transformers and PEFT.

`make families` writes docs/models.md (families_page.py): each family in each of its WAYS, and what they merge into.
"""

import argparse
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from conf.errors import MusterError, first_line
from conf.resolve import flat
from conf.schema import Config
from jobs.model.quantized_linear import BLOCK, QuantizedLinear
from launcher.check import localize, model_files, packing_rules
from tests.jobs import curves, families_page, reference
from tests.jobs.families_page import Cell, merged, page, read_page, result
from tests.jobs.ranks import spawn

ROOT = Path(__file__).resolve().parents[2]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = json.loads(Path(__file__).with_suffix(".json").read_text())
"""Name of a family -> its model_type, and the fields of the config of a tiny model."""
STEPS, RANKS, GROUP = 5, 2, 30
HELD_OUT = 8
"""Samples whose loss is compared after a merge."""
WRITTEN_ANEW = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"}
"""Fields of config.json that a merge sets: `use_cache` is true in every merged model."""
LIMIT = 2e-3
"""Largest relative difference that can come from another order of floating-point operations."""
COMMON = [
    f"cluster.train.ranks_per_node={RANKS}", "cluster.train.gpus_per_node=0", "data.max_rows=60", "data.max_length=48",
    "train.global_batch=4", "train.micro_batch=1", f"train.steps={STEPS}", "train.warmup_steps=1", "train.weight_decay=0",
    "train.precision=fp32", "train.learning_rate=1e-3", "train.eval_every=0", "train.save_every=0", "train.log_every=1000",
    "train.activation_checkpointing=none", "train.eps=1e-4", "jobs=[preprocess,train]",
]  # fmt: skip
WAYS = {
    "full": ["parallel=fsdp"],
    "LoRA": ["parallel=fsdp", "adapter=lora", "adapter.r=4"],
    "QLoRA": ["parallel=fsdp", "adapter=qlora", "adapter.r=4"],
    "packed": ["parallel=fsdp", "data.packing=true"],
    "zero3": ["parallel=zero3"],
    "zero3LoRA": ["parallel=zero3", "adapter=lora", "adapter.r=4"],
    "recomputed": ["parallel=fsdp", "train.activation_checkpointing=full"],
    "compiled": ["parallel=fsdp", "train.compile=true"],
    "compiledLoRA": ["parallel=fsdp", "adapter=lora", "adapter.r=4", "train.compile=true"],
    "compiledpacked": ["parallel=fsdp", "data.packing=true", "train.compile=true"],
}


def make(folder: Path, family: str, std: float = 0.08, dtype: torch.dtype = torch.float32) -> None:
    """Write a random checkpoint with the tokenizer of the examples. The weights are large enough for errors to show."""
    from transformers import AutoConfig, AutoTokenizer

    kind, values = FAMILIES[family]
    torch.manual_seed(0)
    model = auto_class(kind).from_config(AutoConfig.for_model(kind, **values), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, std)
            elif "bias" in name:
                weight.normal_(0, 0.05)
            elif "sink" in name:
                weight.normal_(0, 1.0)
            elif "norm" in name.lower():
                weight.add_(torch.randn(weight.shape) * 0.05)
            if (
                "q_norm" in name or "k_norm" in name
            ):  # Gemma 4 does not scale its scores: they would be so large that rounding decides
                weight.mul_(0.5)
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "examples/tokenizer").save_pretrained(folder)


def auto_class(kind: str) -> Any:
    """The class of transformers that loads a model type whole: with the towers of a multimodal one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_multimodal = any(kind == name and "text_config" in values for name, values in FAMILIES.values())
    return AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM


def check(families: list[str], ways: list[str], folder: Path, compose: Any, *, merge: bool = False) -> list[Cell]:
    """Train each family in each way, and compare it, and with `merge` the merged model too. `compose` is the tests' fixture."""
    from jobs import preprocess

    folder.mkdir(exist_ok=True)

    configs: dict[tuple[str, str], Config] = {}
    refused: list[Cell] = []
    rows: Path | None = None
    # composing takes longer than some trainings: once for each way
    composed = {way: compose("model=hub", "model.source=unknown/unknown", *COMMON, *WAYS[way]) for way in ways}
    for family in families:
        make(folder / family, family)
        for way in ways:
            config = deepcopy(composed[way])
            config.model.source = str(folder / family)
            localize.localize(config, 0)
            if said := _launch_problems(config, folder / family):
                refused.append(Cell(family, way, "refused", said[0]))
                continue
            config.run_dir = str(folder / f"{family}-{way}")
            Path(config.run_dir).mkdir()
            if rows is None:
                preprocess.run(config)
                rows = Path(config.run_dir) / "data"
            else:
                (Path(config.run_dir) / "data").symlink_to(rows)
            configs[family, way] = config
    if configs:
        spawn(_train_all, RANKS, list(configs.values()), merge)
    trained = [cell for (family, way), config in configs.items() for cell in _cells(family, way, config, merge)]
    return [*refused, *trained]


def _launch_problems(config: Config, source: Path) -> list[str]:
    """What launch.py says of packed rows of this model, before a job is queued."""
    files = model_files.read(source, source, local=True)
    return [str(problem) for problem in packing_rules.problems(config, files, frozenset())]


def _train_all(rank: int, configs: list[Config], merge: bool) -> None:
    from jobs.distributed.process_group import process_group

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with process_group(configs[0]) as world:
        for config in configs:
            try:
                curves.train_here(config, world, STEPS, save=merge and _is_merged(config))
            except MusterError as error:
                _write_error(config, rank, "late", first_line(error))
            except Exception as error:  # the table says which family ends in a traceback
                traceback.print_exc()
                _write_error(config, rank, "traceback", f"{type(error).__name__}: {first_line(error)}")
            gc.collect()


def _write_error(config: Config, rank: int, verdict: str, text: str) -> None:
    if rank == 0:
        (Path(config.run_dir) / "error.json").write_text(json.dumps([verdict, text]))


def _is_merged(config: Config) -> bool:
    """Whether the model of a run is merged and compared too: packed rows give no other weights to merge."""
    return not config.data.packing


def _cells(family: str, way: str, config: Config, merge: bool) -> list[Cell]:
    """One cell for the training, and with `merge` one for its merge if the training is right."""
    error = Path(config.run_dir) / "error.json"
    if error.exists():
        return [Cell(family, way, *json.loads(error.read_text()))]
    points, trained = plain_training(config, STEPS)
    differences = curves.differences(curves.points(Path(config.run_dir)), points)
    worst, first = max(differences), differences[0]
    cells = [Cell(family, way, "right" if worst <= LIMIT else "wrong", f"{worst:.1e} (step 1: {first:.1e})")]
    if merge and _is_merged(config) and cells[0].verdict == "right":
        cells.append(Cell(family, f"{way} merged", *_compare_merged(config, trained)))
    for name in ("checkpoints", "model"):
        shutil.rmtree(Path(config.run_dir) / name, ignore_errors=True)
    return cells


def _compare_merged(config: Config, trained: Any) -> tuple[str, str]:
    """(verdict, detail) of the merged folder of a run: transformers loads it, and it is the model `trained` of the reference."""
    from jobs import consolidate
    from jobs.data import batches

    run = Path(config.run_dir)
    try:
        consolidate.run(config)
    except MusterError as error:
        return "late", first_line(error)
    except Exception as error:  # the table says which family ends in a traceback
        traceback.print_exc()
        return "traceback", f"{type(error).__name__}: {first_line(error)}"
    model, loading = auto_class(trained.config.model_type).from_pretrained(
        run / "model", dtype=torch.float32, attn_implementation=_attention(trained.config), output_loading_info=True
    )
    if odd := [f"{kind}: {sorted(names)[0]}" for kind, names in loading.items() if names]:
        return "wrong", ", ".join(odd)
    if fields := _changed_fields(Path(config.model.source), run / "model"):
        return "wrong", f"config.json: {', '.join(fields)}"
    rows = batches.load_split(run / "data", "train", None)
    samples = [rows.samples[sample] for sample in range(HELD_OUT)]
    _restore_stored_weights(trained)
    model.eval()
    trained.eval()
    with torch.no_grad():
        losses = [sum(_sample_loss(item, *sample).item() for sample in samples) for item in (model, trained)]
    difference = abs(losses[0] - losses[1]) / losses[1]
    if _generates(trained, samples[0][0]) and not _generates(model, samples[0][0]):
        return "wrong", "does not generate"
    return "right" if difference <= LIMIT else "wrong", f"{difference:.1e}"


def _generates(model: Any, tokens: Any) -> bool:
    """Whether the model writes three tokens. Kimi Linear cannot: transformers asks a layer without attention for a length."""
    prompt = torch.tensor(tokens[:8].astype("int64"))[None]
    try:
        written = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return int(written.shape[1]) == prompt.shape[1] + 3
    except ValueError:
        return False


def _changed_fields(source: Path, merged_folder: Path) -> list[str]:
    """Fields of config.json that differ, except those that a merge sets."""
    before, after = (flat(json.loads((folder / "config.json").read_text())) for folder in (source, merged_folder))
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if before.get("tie_word_embeddings") is False:  # the field of the text has no effect then, and a merge corrects it
        changed.discard("text_config.tie_word_embeddings")
    return sorted(name for name in changed if name.rpartition(".")[2] not in WRITTEN_ANEW)


def plain_training(config: Config, steps: int) -> tuple[list[tuple[float, float]], Any]:
    """((loss, gradient norm) of each step, the trained model), by transformers and PEFT in one process, with each sample alone."""
    from jobs.data import batches
    from jobs.data.packing import hidden_factor
    from jobs.model import block_sizes

    rows = batches.load_split(
        Path(config.run_dir) / "data", "train", config.data.max_length if config.data.packing else None
    )
    model = plain_model(config)
    order = batches.training_order(rows, config, hidden_factor(block_sizes.of(model.config)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (config.train.beta1, config.train.beta2)
    optimizer = torch.optim.AdamW(trained, betas=betas, eps=config.train.eps, weight_decay=0.0)
    points = []
    for step in range(steps):
        chosen = order.rows_of(step)
        tokens, total = int(rows.label_counts[chosen].sum()), 0.0
        for row in chosen:
            for sample in rows.chosen[rows.packs.row(row)].tolist():
                loss = _sample_loss(model, *rows.samples[sample]) / tokens
                loss.backward()
                total += loss.item()
        _add_router_loss(model, config, rows, chosen)
        used = [parameter for parameter in trained if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(used, config.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = reference._rate(step, steps, config)
        optimizer.step()
        optimizer.zero_grad()
        points.append((total, norm.item()))
    return points, model


def _add_router_loss(model: Any, config: Config, rows: Any, chosen: Any) -> None:
    """Gradients of transformers' router loss, if config.json asks for it: its mean over all micro batches of all ranks."""
    from jobs.data import batches
    from jobs.model import unwrap

    text_config = model.config.get_text_config()
    if not (getattr(text_config, "output_router_logits", False) and text_config.router_aux_loss_coef):
        return
    own = [list(batches.micro_batches(chosen, config.train.micro_batch or 1, rank, RANKS)) for rank in range(RANKS)]
    parts = [part for parts_of_rank in own for part in parts_of_rank]
    for part in parts:
        batch = batches.collate(rows, part, pad=0)
        real = torch.arange(batch.input_ids.shape[1])[None] < torch.from_numpy(rows.lengths[part])[:, None]
        inputs = {"input_ids": batch.input_ids, "use_cache": False, "output_router_logits": True}
        if batch.position_ids is None:
            router_loss = model(**inputs, attention_mask=real.long()).aux_loss
        else:  # transformers has no argument for both the borders of samples and the padding
            logits = model(**inputs, position_ids=batch.position_ids).router_logits
            experts = getattr(text_config, "num_experts", None) or text_config.num_local_experts
            module = sys.modules[type(unwrap.causal_lm(model)).__module__]
            router_loss = module.load_balancing_loss_func(logits, experts, text_config.num_experts_per_tok, real.long())
        (text_config.router_aux_loss_coef * router_loss / len(parts)).backward()


def _attention(model_config: Any) -> str:
    # eager attention of Falcon adds ALiBi twice (transformers 5.23): in the mask, and to the scores
    return "sdpa" if model_config.model_type == "falcon" else "eager"


def plain_model(config: Config) -> Any:
    """The model of transformers; an adapter is PEFT's, with the initial weights of a build by Muster."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    from jobs.model import build

    model_config = AutoConfig.from_pretrained(config.model.source)
    model: Any = auto_class(model_config.model_type).from_pretrained(
        config.model.source, dtype=torch.float32, attn_implementation=_attention(model_config)
    )
    for name, weight in model.named_parameters():
        weight.requires_grad_(not is_multimodal(model) or name.startswith(TEXT))
    if config.adapter.kind.name == "none":
        return model.train()
    targets = config.adapter.targets
    lora = LoraConfig(
        r=config.adapter.r,
        lora_alpha=int(config.adapter.alpha),
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    whole = build.build(config)
    lora.exclude_modules = whole.peft_config["default"].exclude_modules
    built = {name: value for name, value in whole.state_dict().items() if "lora_" in name}
    _round_to_nf4(model, whole)
    if is_multimodal(model):
        built = {in_whole_model(name, model): value for name, value in built.items()}
        modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in built}
        lora.target_modules = {name for name in modules if "experts" not in name}
        experts = sorted(
            {name for name, _ in model.named_parameters() if name.startswith(TEXT) and ".experts." in name}
        )
        lora.target_parameters = experts if any("experts" in name for name in modules) else None
        lora.exclude_modules = None
    model = get_peft_model(model, lora)
    own = [name for name in model.state_dict() if "lora_" in name]
    assert built.keys() == set(own)
    model.load_state_dict(built, strict=False)
    return model.train()


def _round_to_nf4(model: Any, built: Any) -> None:
    """Give `model` the numbers of bitsandbytes' NF4 in the layers that Muster has built as quantized ones."""
    from bitsandbytes import functional

    names = {
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, module in built.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    if is_multimodal(model):
        names = {in_whole_model(name, model) for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_buffer("stored_weight", module.weight.detach().clone(), persistent=False)
        # rows of other lengths get wrong scales from bitsandbytes 0.50 on CPUs
        blocks = module.weight.detach().view(-1, BLOCK)
        numbers, state = functional.quantize_4bit(blocks, quant_type="nf4", compress_statistics=True)
        module.weight.data = functional.dequantize_4bit(numbers, state).view_as(module.weight)


def _restore_stored_weights(model: Any) -> None:
    """A merge adds an adapter to the weights as they are stored in the base, not to those in four bits."""
    for module in model.modules():
        if hasattr(module, "stored_weight"):
            module.weight.data = module.stored_weight


TEXT = ("model.language_model.", "language_model.", "lm_head.")
"""Beginnings of the names of the weights of text in a multimodal model."""


def is_multimodal(model: Any) -> bool:
    return model.config.get_text_config() is not model.config


def in_whole_model(name: str, whole: Any) -> str:
    """The name in a multimodal model of a weight of its model of text."""
    outer = "base_model.model." if name.startswith("base_model.model.") else ""
    inner = name.removeprefix(outer)
    if whole.config.model_type == "llama4":
        return f"{outer}language_model.{inner}"
    if inner.startswith("model."):
        return f"{outer}model.language_model.{inner.removeprefix('model.')}"
    return f"{outer}{inner}"


def _sample_loss(model: Any, tokens: Any, trained: Any) -> torch.Tensor:
    ids, mask = torch.tensor(tokens.astype("int64"))[None], torch.tensor(trained.astype("bool"))[1:]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum")


def compose(*words: str) -> Config:
    """The config of a run on a machine without GPUs."""
    import hydra
    from hydra.core.config_store import ConfigStore

    from conf import resolve

    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = resolve.resolve(hydra.compose("config", overrides=["run_dir=/runs/families", *words]))
    localize.localize(config, 0)
    return config


def check_group(group: list[str], ways: list[str], folder: Path) -> list[Cell]:
    """The cells of some families, which train in the same two processes."""
    try:
        return check(group, ways, folder, compose, merge=True)
    except Exception as error:  # the ranks of this group ended apart
        text = f"{type(error).__name__}: {first_line(error)}"
        return [Cell(family, way, "traceback", text) for family in group for way in ways]


def main(words: list[str]) -> int:
    """Check families, and write their lines of docs/models.md as they are found; other ways than the page's are only printed."""
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.families", description=main.__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="FAMILY", help="check these families")
    parser.add_argument("--from", dest="first", choices=FAMILIES, metavar="FAMILY", help="go on from this family")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=families_page.WAYS, help="how to train them")
    options = parser.parse_args(words)
    names = list(FAMILIES)
    names = options.only or names[names.index(options.first) if options.first else 0 :]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path, cells = ROOT / "docs/models.md", []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(names), GROUP):
            found = check_group(names[start : start + GROUP], options.ways, Path(folder) / str(start))
            print("\n".join(map(str, found)), flush=True)
            cells += found
            path.write_text(page(merged(read_page(path.read_text()), found, FAMILIES)))
    print(result(cells))
    return any(cell.verdict not in ("right", "refused") for cell in cells)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
