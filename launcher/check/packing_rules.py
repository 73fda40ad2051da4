"""Refuses packed rows for models that mix the samples of a row, before a job is queued; pure.

The table holds what jobs/training/packing_probe.py finds with the transformers of constraints.txt. The probe needs torch, so it
runs in the jobs `preflight` and `train`, and decides about all other models. tests/jobs/training/test_packing_probe.py compares.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from conf.errors import Problem
from conf.schema import Config
from launcher.check.model_files import ModelFiles
from launcher.estimate.config_json import text_fields

DELTA_RULE = frozenset({"fla", "causal_conv1d"})
MAMBA2 = frozenset({"mamba_ssm", "causal_conv1d"})
CONVOLUTION = frozenset({"causal_conv1d"})
NO_KERNEL = frozenset[str]()
LEAKING: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid"), DELTA_RULE),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), DELTA_RULE),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"), MAMBA2),
    **dict.fromkeys(("lfm2", "lfm2_moe", "inkling_text", "inkling2_text"), CONVOLUTION),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba", "recurrent_gemma", "rwkv", "xlstm"), NO_KERNEL),
    **dict.fromkeys(("bloom", "falcon", "minimax", "lfm3", "zaya", "deepseek_v4", "openai-gpt", "cpmant"), NO_KERNEL),
}  # fmt: skip
"""Family -> packages with the kernels that may keep samples apart on a GPU. Without one of them, or on CPUs, samples mix."""
ATTENTION = frozenset({"attention", "full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"})
"""Kinds of layers that keep samples apart. A hybrid family may have no others, as in Granite 4.0 without Mamba."""
NEEDS_MASK = frozenset({"afmoe", "biogpt", "falcon", "gpt_oss", "mpt", "opt", "xglm"})
"""Families that keep samples apart only by a mask, which ranks that share a row cannot make."""


def problems(config: Config, files: ModelFiles | None, kernels: frozenset[str] | None) -> Iterator[Problem]:
    """Whether the model mixes the samples of packed rows. `kernels` are the packages of `LEAKING` that jobs can import; None if
    it is not known.
    """
    fields = _fields(config, files)
    if not config.data.packing or fields is None or not {"preflight", "preprocess", "train"} & set(config.jobs):
        return
    family = str(fields.get("model_type"))
    if family in LEAKING and not _only_attends(family, fields) and not _may_have_kernels(config, family, kernels):
        without = f" without the kernels of {' and '.join(sorted(LEAKING[family]))}" if LEAKING[family] else ""
        message = (
            f"{family} does not keep the samples of a row apart{without}, so they would be trained on each other. "
        )
        yield Problem("data.packing", True, f"{message}Set data.packing=false to train {family}")
    elif family in NEEDS_MASK and config.parallel.context_ranks > 1:
        message = (
            f"{family} keeps the samples of a row apart only by a mask, which ranks that share a row cannot make. "
        )
        yield Problem("data.packing", True, f"{message}Set data.packing=false, or parallel.context_ranks=1")


def _fields(config: Config, files: ModelFiles | None) -> Mapping[str, Any] | None:
    """The fields of the model of text: of its config.json, or of `model.architecture`."""
    if files is not None and files.fields is not None:
        return text_fields(files.fields)
    shape = config.model.architecture
    return {"model_type": shape.model_type, **shape.extra} if shape else None


def _only_attends(family: str, fields: Mapping[str, Any]) -> bool:
    if family == "falcon":
        return not fields.get("alibi")
    kinds = fields.get("layer_types") or fields.get("layers_block_type")
    return isinstance(kinds, list) and ATTENTION.issuperset(kinds)


def _may_have_kernels(config: Config, family: str, kernels: frozenset[str] | None) -> bool:
    """Whether the kernels may be there. Then the probe decides, in preflight or at the start of training."""
    needed = LEAKING[family]
    return bool(needed) and config.cluster.train.gpus_per_node != 0 and (kernels is None or kernels >= needed)
