"""Finds the weights among the tensors of a checkpoint: takes off what wrappers and trainers put before their names."""

import logging
import re
from collections.abc import Iterable
from typing import Any

from conf.errors import DataError, Problem
from jobs.consolidation.weight_names import live_name
from jobs.tensor_io.wrapper_names import without_torch_wrappers

log = logging.getLogger(__name__)

_NOT_WEIGHTS = re.compile(
    r"(^|\.)(optimizers?|optim|optimizer_states?|optim_states?|opt_state|lr_schedulers?|schedulers?|dataloader|train_state"
    r"|rng_state|grad_scaler|scaler)\."
    r"|(^|\.)(exp_avg\w*|exp_inf|max_exp_avg_sq|momentum_buffer|square_avg|acc_delta|grad_avg|step)(\.|$)"
)
"""State of the optimizer and of the loop, by a part of its name."""
_SECOND_COPY = re.compile(r"(^|[._])(ema|shadow|averaged|n_averaged|swa|teacher|lookahead|slow|master)([._]|$)")
"""Names of copies of the weights that some trainers keep beside the weights."""
_PREFIXES = ("app.", "state.", "state_dict.", "module.", "_forward_module.")
"""What trainers put before all names."""
MAX_LISTED = 3


def strip_prefixes(
    tensors: dict[str, Any], live_names: Iterable[str] | None = None, prefix: str | None = None
) -> dict[str, Any]:
    """The weights among the tensors of a checkpoint, without the prefixes that wrappers and trainers put before their names.

    With the names of the live model the prefix is what stands before those; without, it is guessed from the names alone.
    `prefix`, as the user gives it, takes only what is under it. Raises DataError if a tensor is neither a weight nor known to be
    something else: it could be the weights in another form, or a part of them.
    """
    names: dict[str, Any] = {}
    for key, value in tensors.items():
        name = without_torch_wrappers(key)
        if name in names:
            raise DataError(Problem("checkpoint", None, f"holds {name} twice, also as {key}: save it without the copy"))
        names[name] = value
    if prefix is not None:
        return _under(names, prefix)
    wanted = set(live_names) if live_names is not None else None
    known = wanted or set()
    weights = {key: value for key, value in names.items() if key in known or not _NOT_WEIGHTS.search(key)}
    if wanted is None:
        return _without_guessed_prefix(weights)
    counts = _prefixes_before(weights, wanted)
    if not counts:
        return _without_guessed_prefix(weights)
    most_common = max(counts, key=lambda item: counts[item])
    found = {key.removeprefix(most_common): value for key, value in weights.items() if key.startswith(most_common)}
    if left := sorted(key for key in weights if not key.startswith(most_common)):
        raise _unexplained(left, [item for item in counts if item] or [most_common])
    if most_common == "" and len(counts) > 1:
        raise _unexplained(
            sorted(key for key in weights if any(key.startswith(item) for item in counts if item)), list(counts)
        )
    return found


def _under(names: dict[str, Any], prefix: str) -> dict[str, Any]:
    found = {key.removeprefix(prefix): value for key, value in names.items() if key.startswith(prefix)}
    if not found:
        message = f"is before no name of the checkpoint; names are like {', '.join(sorted(names)[:MAX_LISTED])}"
        raise DataError(Problem("--prefix", prefix, message))
    log.info(f"left out {len(names) - len(found)} tensors whose names do not begin with {prefix!r}")
    return found


def _unexplained(names: list[str], prefixes: list[str]) -> DataError:
    message = (
        f"holds {len(names)} tensors that are not the weights of the model ({', '.join(names[:MAX_LISTED])}): name the "
        f"prefix of those to merge, {' or '.join(f'--prefix={item!r}' for item in prefixes[:MAX_LISTED])}, or save it without them"
    )
    return DataError(Problem("checkpoint", None, message))


def _prefixes_before(keys: Iterable[str], wanted: set[str]) -> dict[str, int]:
    """What stands before live names -> before how many of them."""
    counts: dict[str, int] = {}
    for key in keys:
        parts = live_name(key).split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                prefix = "".join(f"{part}." for part in parts[:cut])
                counts[prefix] = counts.get(prefix, 0) + 1
                break
    return counts


def _without_guessed_prefix(weights: dict[str, Any]) -> dict[str, Any]:
    if copies := sorted(key for key in weights if _SECOND_COPY.search(key)):
        groups = sorted({f"{key.partition('.')[0]}." for key in weights})
        raise _unexplained(copies, groups)
    prefix = _guessed_prefix(weights)
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def _guessed_prefix(keys: Iterable[str]) -> str:
    names, prefix = list(keys), ""
    changed = bool(names)
    while changed:
        changed = False
        for candidate in _PREFIXES:
            if all(name.startswith(candidate) for name in names):
                names, prefix, changed = [name.removeprefix(candidate) for name in names], prefix + candidate, True
    if names and all(name.startswith("model.") for name in names):
        rest = [name.removeprefix("model.") for name in names]
        # the decoder of a causal model is itself called `model`: that one is not a prefix
        is_decoder = any(name.startswith("embed_tokens.") for name in rest)
        if any(name.startswith(("model.", "lm_head.", "base_model.")) for name in rest) or not is_decoder:
            prefix += "model."
    return prefix
