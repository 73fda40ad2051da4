"""Tiny random checkpoints of model families, trained on two ranks and compared with plain transformers and PEFT.

`make families` writes docs/models.md: each family with a full fine-tune, a LoRA and packed rows, under FSDP.
"""

import gc
import json
import logging
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from conf.errors import MusterError, first_line
from conf.schema import Config
from tests.jobs import reference
from tests.jobs.ranks import spawn

ROOT = Path(__file__).resolve().parents[2]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = json.loads(Path(__file__).with_suffix(".json").read_text())
"""Name of a family -> its model_type, and the fields of the config of a tiny model."""
STEPS, RANKS, GROUP = 5, 2, 10
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
    "packed": ["parallel=fsdp", "data.packing=true"],
    "zero3": ["parallel=zero3"],
    "recomputed": ["parallel=fsdp", "train.activation_checkpointing=full"],
    "compiled": ["parallel=fsdp", "train.compile=true"],
    "compiledLoRA": ["parallel=fsdp", "adapter=lora", "adapter.r=4", "train.compile=true"],
    "compiledpacked": ["parallel=fsdp", "data.packing=true", "train.compile=true"],
}


@dataclass(frozen=True)
class Cell:
    """What became of one family trained in one way."""

    family: str
    way: str
    verdict: str
    """right, refused, wrong or traceback."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.family:<20} {self.way:<7} {self.verdict:<9} {self.detail}"


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


def check(families: list[str], ways: list[str], folder: Path, compose: Any) -> list[Cell]:
    """Train each family in each way, and compare it. `compose` is the tests' fixture."""
    from jobs import preprocess

    folder.mkdir(exist_ok=True)

    configs: dict[tuple[str, str], Config] = {}
    rows: Path | None = None
    for family in families:
        make(folder / family, family)
        for way in ways:
            config = compose("model=hub", f"model.source={folder / family}", *COMMON, *WAYS[way])
            config.run_dir = str(folder / f"{family}-{way}")
            Path(config.run_dir).mkdir()
            if rows is None:
                preprocess.run(config)
                rows = Path(config.run_dir) / "data"
            else:
                (Path(config.run_dir) / "data").symlink_to(rows)
            configs[family, way] = config
    spawn(_train_all, RANKS, list(configs.values()))
    return [_cell(family, way, config) for (family, way), config in configs.items()]


def _train_all(rank: int, configs: list[Config]) -> None:
    from jobs import train, train_step
    from jobs.distributed import stop_signals
    from jobs.distributed.process_group import process_group

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with process_group(configs[0]) as world:
        for config in configs:
            try:
                training, step = train._set_up(config, world, stop_signals.StopFlag())
                while step < STEPS:
                    train_step.run(training, step)
                    step += 1
                training.metrics.close()
                del training
            except MusterError as error:
                _write_error(config, rank, "refused", first_line(error))
            except Exception as error:  # the table says which family ends in a traceback
                traceback.print_exc()
                _write_error(config, rank, "traceback", f"{type(error).__name__}: {first_line(error)}")
            gc.collect()


def _write_error(config: Config, rank: int, verdict: str, text: str) -> None:
    if rank == 0:
        (Path(config.run_dir) / "error.json").write_text(json.dumps([verdict, text]))


def _cell(family: str, way: str, config: Config) -> Cell:
    error = Path(config.run_dir) / "error.json"
    if error.exists():
        return Cell(family, way, *json.loads(error.read_text()))
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    expected = plain_curve(config, STEPS)
    differences = [
        max(abs(value - right) / right for value, right in zip(step, right_step, strict=True))
        for step, right_step in zip(steps, expected, strict=True)
    ]
    worst, first = max(differences), differences[0]
    return Cell(family, way, "right" if worst <= LIMIT else "wrong", f"{worst:.1e} (step 1: {first:.1e})")


def plain_curve(config: Config, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, by transformers and PEFT in one process, with every sample alone in its row."""
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
    return points


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


def plain_model(config: Config) -> Any:
    """The model of transformers; an adapter is PEFT's, with the initial weights of a build by Muster."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    from jobs.model import build

    kind = AutoConfig.from_pretrained(config.model.source).model_type
    # eager attention of Falcon adds ALiBi twice (transformers 5.23): in the mask, and to the scores
    attention = "sdpa" if kind == "falcon" else "eager"
    model: Any = auto_class(kind).from_pretrained(
        config.model.source, dtype=torch.float32, attn_implementation=attention
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
    from launcher.check import localize

    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = resolve.resolve(hydra.compose("config", overrides=["run_dir=/runs/families", *words]))
    localize.localize(config, 0)
    return config


def table(cells: list[Cell]) -> str:
    """A Markdown table: one line per family, one column per way, and the reasons of refusals below."""
    ways = list(dict.fromkeys(cell.way for cell in cells))
    found = {(cell.family, cell.way): cell for cell in cells}
    lines = ["| family | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for family in dict.fromkeys(cell.family for cell in cells):
        row = [found.get((family, way)) for way in ways]
        lines.append(f"| {family} | " + " | ".join(_short(cell) for cell in row) + " |")
    return "\n".join(lines)


def _short(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return cell.detail.partition(" ")[0] if cell.verdict == "right" else f"**{cell.verdict}**"


def reasons(cells: list[Cell]) -> str:
    """One line per cell that is not right, with the message that the user sees."""
    return "\n".join(f"- {cell.family}, {cell.way}: {cell.detail}" for cell in cells if cell.verdict != "right")


PAGE = """# Models: families compared with plain transformers and PEFT

{ranks} ranks on CPUs (Gloo, float32) train a tiny random model of each family for {steps} steps of AdamW under FSDP: all weights,
a LoRA on all linear layers (with the experts that PEFT finds), and all weights on packed rows. The reference is transformers and
PEFT in one process, with every sample alone in its row. A cell is the largest relative difference of loss or gradient norm over
all steps; above {limit:g} it is called wrong. `refused` means: a message before any weight is read, which names the key to change.
`make families` writes this page. Names are those of tests/jobs/families.json.

Multimodal models are gemma3, gemma4, glm4v, internvl, lfm2_vl, llama4, llava_next, mistral3, mistral3_ministral3, qwen2_vl,
qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5 and qwen3_5_moe: there the reference is the whole model with frozen towers.

{table}

## Multimodal models

Muster trains the text of a multimodal model. Rows with images are refused when they are prepared.

- Training builds the decoder and the output head alone. The towers of images and sound stay in the files of `model.source`, and
  the log says so: `vision tower (N tensors, X GiB) stays as it is in SOURCE`. An adapter is put on the decoder only.
- A merge writes the whole model: the trained text under the names of the base, every other tensor with the bytes and the dtype
  of the base, config.json, and the settings of the processor. `evaluate` and `generate` load that whole model.
- Before training, a tiny model of the same classes is tried: the whole model must have the logits and gradients of the decoder
  alone. Another family is refused then. Known to differ, and refused before anything is queued: Cohere 2 Vision (it scales
  logits otherwise), Llama 3.2 Vision (layers that only images train), and models that read no text without an image (BLIP-2,
  InstructBLIP, Kosmos-2).

## Tensors that training does not use

Some models are stored with layers that predict several tokens (`mtp.*`, or a layer after the last). transformers skips those
that it knows, and others are refused. `model.ignore_tensors=["^mtp[.]"]` names them by regular expressions. They are not
loaded. A merge copies them from `model.source` as they are, so that config.json still fits. They were not trained with the
rest: speculative decoding with them may accept fewer tokens. A model that is merged in memory loses them.

## What is refused

{reasons}
"""


def result(cells: list[Cell]) -> str:
    """The line that a script can read."""
    counts = {kind: sum(cell.verdict == kind for cell in cells) for kind in ("right", "refused", "wrong", "traceback")}
    return (
        f"RESULT families={len({cell.family for cell in cells})} right={counts['right']} refused={counts['refused']} "
        f"wrong={counts['wrong']} tracebacks={counts['traceback']}"
    )


def page(cells: list[Cell]) -> str:
    """The text of docs/models.md."""
    return PAGE.format(ranks=RANKS, steps=STEPS, limit=LIMIT, table=table(cells), reasons=reasons(cells))


def main() -> None:
    """`python -m tests.jobs.families [family ...] [way ...]`: print the verdicts. Without names: all, and write docs/models.md."""
    families = [word for word in sys.argv[1:] if word in FAMILIES] or list(FAMILIES)
    ways = [word for word in sys.argv[1:] if word in WAYS] or ["full", "LoRA", "packed"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(families), GROUP):
            group = families[start : start + GROUP]
            try:
                found = check(group, ways, Path(folder) / str(start), compose)
            except Exception as error:  # the ranks of this group ended apart
                text = f"{type(error).__name__}: {first_line(error)}"
                found = [Cell(family, way, "traceback", text) for family in group for way in ways]
            print("\n".join(map(str, found)), flush=True)
            cells += found
    if not sys.argv[1:]:
        (ROOT / "docs/models.md").write_text(page(cells))
    print(result(cells))
    sys.exit(any(cell.verdict in ("wrong", "traceback") for cell in cells))


if __name__ == "__main__":
    main()
