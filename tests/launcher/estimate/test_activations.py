"""launcher/estimate/activations.py: estimates equal what autograd saves and what the loss allocates."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from conf.choices import AdapterKind, Precision
from conf.schema_model import Architecture
from launcher.estimate import activations
from launcher.estimate.activations import Loss
from launcher.estimate.parameters import count
from tests.conftest import Compose, put
from tests.shapes import FAMILIES, adapted, built, small


def saved_bytes(model: Any, shape: Architecture, tokens: int) -> int:
    """What a forward pass of one row keeps for backward, parameters aside."""
    import torch

    weights = {item.untyped_storage().data_ptr() for item in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=torch.randint(0, shape.vocab_size, (1, tokens)))
        size = int(sum(storage.nbytes() for storage in kept.values()))
    del out
    return size


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32], ids=lambda item: item.name)
@pytest.mark.parametrize("targets", [None, ["all-linear"], ["q_proj", "v_proj"]], ids=["full", "lora", "lora on q, v"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if "biases" not in name and name != "mixtral"])
def test_a_block_saves_what_autograd_saves(
    compose: Compose, family: str, targets: list[str] | None, precision: Precision
) -> None:
    config = put(compose("cluster=slurm", "model=llama8b"), {"train.precision": precision, "adapter.r": 8})
    if targets:
        put(config, {"adapter.kind": AdapterKind.lora, "adapter.targets": targets})
    tokens, sizes = 64, []
    for layers in (2, 3):
        config.model.architecture = small(family, layers=layers)
        dtype = "float32" if precision is Precision.fp32 else "bfloat16"
        model = built(config.model.architecture, "cpu", dtype).train()
        if targets:
            model = adapted(model, targets)
            model.enable_input_require_grads()
        sizes.append(saved_bytes(model, config.model.architecture, tokens))
    assert activations.saved_by_block(config, fused_kernels=False) == (sizes[1] - sizes[0]) / tokens


def peak_bytes(work: Any) -> int:
    """The most that tensors made by `work` held at once."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):  # type: ignore[misc]  # pyproject.toml makes mypy skip torch
        now = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.known: weakref.WeakSet[Any] = weakref.WeakSet()

        def gone(self, size: int) -> None:
            self.now -= size

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            inputs = {id(item.untyped_storage()) for item in tree_leaves(args) if isinstance(item, torch.Tensor)}
            for item in tree_leaves(out):
                storage = item.untyped_storage() if isinstance(item, torch.Tensor) else None
                if storage is not None and id(storage) not in inputs and storage not in self.known:
                    self.known.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage.nbytes())
            self.peak = max(self.peak, self.now)
            return out

    with Live() as live:
        work()
    return int(live.peak)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32], ids=lambda item: item.name)
def test_the_estimate_of_logits_matches_the_plain_loss(compose: Compose, precision: Precision) -> None:
    torch = pytest.importorskip("torch")
    from jobs.data.batches import Batch
    from jobs.training import loss

    rows, length, vocabulary, hidden = 2, 64, 4096, 4
    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    head = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=dtype)
    states = torch.randn(rows, length, hidden, dtype=dtype)
    ids = torch.randint(0, vocabulary, (rows, length))
    batch = Batch(input_ids=ids, labels=ids, trained=torch.arange(0))  # `trained` is for fused losses
    model = torch.nn.Module()
    model.config = SimpleNamespace(_attn_implementation="sdpa")
    model.forward = lambda **_: SimpleNamespace(logits=head(states))
    peak = peak_bytes(lambda: loss.summed_cross_entropy(model, batch).backward())
    config = put(
        compose("cluster=slurm", "model=llama8b"),
        {
            "train.precision": precision,
            "train.micro_batch": rows,
            "data.max_length": length,
            "model.architecture.vocab_size": vocabulary,
            "model.architecture.hidden_size": hidden,
        },
    )
    assert config.model.architecture
    counts = count(config.model.architecture, config.adapter)
    assert counts
    assert activations.logit_bytes(config, counts, loss=Loss.plain) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("targets", [None, ["q_proj"], ["lm_head"]], ids=["full", "lora", "lora on the head"])
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32], ids=lambda item: item.name)
def test_the_estimate_of_logits_matches_the_fused_loss(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, precision: Precision, targets: list[str] | None, chunks: int
) -> None:
    torch = pytest.importorskip("torch")
    from jobs.model import fused_cross_entropy as head

    tokens, vocabulary, hidden = 512, 4096, 64
    for module in (head, activations):
        monkeypatch.setattr(module, "CHUNK", tokens * vocabulary // chunks)
    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    last: Any = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=dtype)
    last.weight.requires_grad_(targets is None)
    if targets == ["lm_head"]:
        last = torch.nn.Sequential(torch.nn.Linear(hidden, hidden, dtype=dtype), last)
    else:
        head._let_head_return_loss(last, compiled=False)
    states = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    wanted = torch.randint(0, vocabulary, (tokens,))
    call: Any = (
        (lambda rows: head._loss_in_parts(last, rows, wanted, 0.0))
        if targets == ["lm_head"]
        else lambda rows: last(rows, wanted)
    )
    peak = peak_bytes(lambda: call(states.index_select(0, torch.arange(tokens))).backward())
    config = put(
        compose("cluster=slurm", "model=llama8b"),
        {
            "train.precision": precision,
            "data.max_length": tokens,
            "model.architecture.vocab_size": vocabulary,
            "model.architecture.hidden_size": hidden,
            "model.architecture.num_hidden_layers": 1,
        },
    )
    if targets:
        put(config, {"adapter.kind": AdapterKind.lora, "adapter.targets": targets})
    assert config.model.architecture
    counts = count(config.model.architecture, config.adapter)
    assert counts
    assert activations.logit_bytes(config, counts, loss=Loss.fused) == pytest.approx(peak, rel=0.1)


def kept_alive(model: Any, ids: Any) -> int:
    """Bytes of what a forward pass made that are still there once it has returned, parameters aside."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Made(TorchDispatchMode):  # type: ignore[misc]  # pyproject.toml makes mypy skip torch
        def __init__(self) -> None:
            super().__init__()
            self.storages: weakref.WeakSet[Any] = weakref.WeakSet()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.storages.update(item.untyped_storage() for item in tree_leaves(out) if isinstance(item, torch.Tensor))
            return out

    weights = {item.untyped_storage().data_ptr() for item in model.parameters()}
    with Made() as made:
        out = model(input_ids=ids)
    gc.collect()
    size = int(sum(storage.nbytes() for storage in made.storages if storage.data_ptr() not in weights))
    del out
    return size


@pytest.mark.parametrize("targets", [None, ["all-linear"], ["q_proj", "v_proj"]], ids=["full", "lora", "lora on q, v"])
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama with wide heads", "qwen2"])
def test_the_estimate_matches_what_a_recomputed_block_keeps(
    compose: Compose, family: str, mode: str, targets: list[str] | None
) -> None:
    torch = pytest.importorskip("torch")
    from jobs.distributed.process_group import World
    from jobs.model import prepare

    config = put(
        compose("cluster=slurm", "model=llama8b", f"train.activation_checkpointing={mode}", "train.compile=false"),
        {"adapter.r": 8},
    )
    if targets:
        put(config, {"adapter.kind": AdapterKind.lora, "adapter.targets": targets})
    tokens, sizes = 64, []
    cpu = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    for layers in (2, 3):
        config.model.architecture = small(family, layers=layers)
        model = built(config.model.architecture, "cpu").train()
        if targets:
            model = adapted(model, targets)
            model.enable_input_require_grads()
        prepare.prepare_model(model, config, cpu)
        ids = torch.randint(0, config.model.architecture.vocab_size, (1, tokens))
        sizes.append(kept_alive(model, ids))
    assert config.model.architecture
    expected = 2.0 * config.model.architecture.hidden_size
    if mode == "selective":
        expected += activations.kept_by_selection(config, compiled=False)
    assert (sizes[1] - sizes[0]) / tokens == pytest.approx(expected, rel=0.01)
