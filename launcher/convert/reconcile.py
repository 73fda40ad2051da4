"""Settles rows that bear on each other, so that the table says what the experiment really has."""

from collections.abc import Sequence
from dataclasses import replace

from launcher.convert.keys import Outcome, Row


def reconcile(rows: Sequence[Row]) -> list[Row]:
    """The same rows, changed where another one decides."""
    if _has(rows, "parallel.offload_optimizer", True) or _has(rows, "/parallel", "fsdp_offload", "zero3_offload"):
        rows = [_optimizer_on_host(row) for row in rows]
    zero = any(str(row.ours.get("/parallel", "")).startswith("zero") for row in rows)
    offloads = _has(rows, "/parallel", "zero3_offload")
    idle = [] if zero else ["parallel.deepspeed."]
    for section, ours in (("offload_param", "offload_parameters"), ("offload_optimizer", "offload_optimizer")):
        if not (offloads or _has(rows, f"parallel.{ours}", True)):
            idle.append(f"parallel.deepspeed.zero_optimization.{section}.")
    rows = [_idle(row, idle) for row in rows]
    if not _has(rows, "/adapter", "lora", "qlora"):
        rows = [_without_adapter(row) for row in rows]
    return _with_the_last_value(rows)


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
