"""Settles rows that bear on each other, so that the table says what the experiment really has."""

from collections.abc import Sequence
from dataclasses import replace

from launcher.convert.common_rules import HELD_OUT_ROWS
from launcher.convert.keys import Outcome, Row


def reconcile(rows: Sequence[Row]) -> list[Row]:
    """The same rows, changed where another one decides."""
    zero = any(str(row.ours.get("/parallel", "")).startswith("zero") for row in rows)
    rows = _of_the_layout(rows, zero)
    rows = _of_the_adapter(rows, zero)
    rows = [_last_rows(row, rows) for row in rows]
    if _has(rows, "train.lr_schedule", "constant"):
        rows = [_without_warmup(row) for row in rows]
    if _has(rows, "data.validation_fraction", 0) and not any("data.validation_path" in row.ours for row in rows):
        rows = [_without_held_out(row) for row in rows]
    return _with_the_last_value(_with_all_fields(rows))


def _of_the_layout(rows: Sequence[Row], zero: bool) -> list[Row]:
    """Rows changed by how the model is sharded."""
    if _has(rows, "parallel.offload_optimizer", True) or _has(rows, "/parallel", "fsdp_offload", "zero3_offload"):
        rows = [_optimizer_on_host(row) for row in rows]
    offloads = _has(rows, "/parallel", "zero3_offload")
    idle = [] if zero else ["parallel.deepspeed."]
    for section, ours in (("offload_param", "offload_parameters"), ("offload_optimizer", "offload_optimizer")):
        if not (offloads or _has(rows, f"parallel.{ours}", True)):
            idle.append(f"parallel.deepspeed.zero_optimization.{section}.")
    rows = [_fits_the_layout(_idle(row, idle), zero) for row in rows]
    if any(int(row.ours.get("parallel.context_ranks", 1)) > 1 for row in rows):
        rows = [_shared_rows(row) for row in rows]
    return rows


def _of_the_adapter(rows: Sequence[Row], zero: bool) -> list[Row]:
    """Rows changed because there is an adapter, or none."""
    adapter = _has(rows, "/adapter", "lora", "qlora")
    rows = [_frozen_base(row) if adapter else _without_adapter(row) for row in rows]
    if _has(rows, "/adapter", "qlora") or _has(rows, "adapter.base", "nf4", "int8"):
        rows = [_starts_from_the_base(row) for row in rows]
    return [_without_float8(row, zero) for row in rows] if zero or adapter else rows


def _has(rows: Sequence[Row], key: str, *values: object) -> bool:
    return any(row.ours.get(key) in values for row in rows)


def _optimizer_on_host(row: Row) -> Row:
    """An optimizer whose state cannot be in host memory becomes AdamW there."""
    if row.ours.get("train.optimizer", "adamw") == "adamw":
        return row
    why = "the optimizer state is in host memory, where Muster runs DeepSpeed's or torch's AdamW in fp32"
    return replace(row, outcome=Outcome.changed, ours={"train.optimizer": "adamw"}, why=why)


def _idle(row: Row, prefixes: Sequence[str]) -> Row:
    """Settings of DeepSpeed for what is not used: ZeRO itself, or an offload."""
    if not any(key.startswith(tuple(prefixes)) for key in row.ours):
        return row
    return replace(row, outcome=Outcome.unneeded, ours={}, why="belongs to ZeRO or an offload that is not used")


def _without_adapter(row: Row) -> Row:
    """Settings of an adapter that is not there."""
    if not row.ours or not all(key.startswith("adapter.") for key in row.ours):
        return row
    return replace(row, outcome=Outcome.unneeded, ours={}, why="there is no adapter")


def _starts_from_the_base(row: Row) -> Row:
    """PiSSA and OLoRA take their start off the base, which must then not be quantized."""
    if row.ours.get("adapter.init") not in ("pissa", "olora"):
        return row
    why = "needs a base that is not quantized: set adapter=lora, or leave the adapter to begin as usual"
    return replace(row, outcome=Outcome.refused, ours={}, why=why)


def _last_rows(row: Row, rows: Sequence[Row]) -> Row:
    """A number of held-out rows: the last ones of the only set."""
    if HELD_OUT_ROWS not in row.ours:
        return row
    ours: dict[str, object] = {}
    for other in rows:
        ours |= other.ours
    count, path = row.ours[HELD_OUT_ROWS], ours.get("data.path")
    if path is None or "data.split" in ours:
        why = "is a number of rows of several sets. Set data.validation_fraction, or data.validation_path"
        return replace(row, outcome=Outcome.refused, ours={}, why=why)
    parts = {"data.validation_path": path, "data.validation_split": f"[-{count}:]", "data.split": f"[:-{count}]"}
    return replace(row, ours=parts, why="the last rows, not random ones")


NOT_PAGED = {"paged_adamw": "adamw", "paged_adamw_8bit": "adamw_8bit"}


def _fits_the_layout(row: Row, zero: bool) -> Row:
    """Optimizers that one backend does not have."""
    chosen = row.ours.get("train.optimizer")
    if not zero and chosen in NOT_PAGED:
        why = "the same optimizer without paging, which Muster has under ZeRO only"
        return replace(row, outcome=Outcome.changed, ours={"train.optimizer": NOT_PAGED[chosen]}, why=why)
    if zero and chosen in ("muon", "adafactor"):
        why = f"{chosen} needs whole matrices: choose parallel=fsdp, or train.optimizer=adamw_8bit"
        return replace(row, outcome=Outcome.refused, ours={}, why=why)
    return row


def _frozen_base(row: Row) -> Row:
    """Weights of the base that an adapter freezes."""
    if "train.unfrozen" not in row.ours:
        return row
    why = "an adapter freezes the base. Use adapter=none, or name the layers in adapter.targets or adapter.modules_to_save"
    return replace(row, outcome=Outcome.refused, ours={}, why=why)


def _without_float8(row: Row, zero: bool) -> Row:
    """Products in 8 bits, which train.float8 has for full fine-tunes on FSDP's tensors."""
    if row.ours.get("train.float8", "none") == "none":
        return row
    why = (
        "works under FSDP only: choose parallel=fsdp" if zero else "is for full fine-tunes: choose adapter=lora_float8"
    )
    return replace(row, outcome=Outcome.refused, ours={}, why=why)


def _shared_rows(row: Row) -> Row:
    """Kernels that cannot share the tokens of a row between ranks."""
    if row.ours.get("model.attention", "auto") in ("auto", "sdpa"):
        return row
    why = "of the kernels that share a row between GPUs, Muster takes the fastest"
    return replace(row, outcome=Outcome.changed, ours={"model.attention": "auto"}, why=why)


def _without_warmup(row: Row) -> Row:
    if not {"train.warmup_steps", "train.warmup_ratio"} & set(row.ours):
        return row
    return replace(row, outcome=Outcome.unneeded, ours={}, why="a constant learning rate has no warmup")


def _without_held_out(row: Row) -> Row:
    """What needs a held-out loss, where no row is held out."""
    if not any(row.ours.get(key) for key in ("train.early_stopping.patience", "train.keep_best")) and (
        row.ours.get("consolidate.step") != "best"
    ):
        return row
    return replace(
        row, outcome=Outcome.refused, ours={}, why="nothing is held out: set data.validation_fraction=0.05 too"
    )


def _with_all_fields(rows: Sequence[Row]) -> list[Row]:
    """Rows in which each one that sets columns of the rows has those of all others too."""
    fields = {name: column for row in rows for name, column in row.ours.get("data.fields", {}).items()}
    return [
        replace(row, ours={**row.ours, "data.fields": fields}) if "data.fields" in row.ours else row for row in rows
    ]


def _with_the_last_value(rows: Sequence[Row]) -> list[Row]:
    """Where two keys give one key of Muster different values, the last one counts, and the others say so."""
    last = {key: row for row in rows for key in row.ours}
    settled = []
    for row in rows:
        lost = [key for key, value in row.ours.items() if last[key].ours[key] != value]
        if lost:
            why = f"{', '.join(dict.fromkeys(last[key].key for key in lost))} counts"
            ours = {key: value for key, value in row.ours.items() if key not in lost}
            row = replace(row, outcome=Outcome.changed, ours=ours, why="; ".join(filter(None, [row.why, why])))
        settled.append(row)
    return settled
