"""Recomputation and compilation change what a step costs, never what it computes; and parameters keep their names."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from conf.choices import AdapterKind, Checkpointing
from jobs import backends
from jobs.distributed.process_group import World, process_group
from jobs.model import build, compile, fused_ops, prepare
from jobs.model.build import blocks
from jobs.training import loss
from tests.jobs.networks import adapted, check_equal, gradients, network, rows, whole
from tests.jobs.ranks import spawn

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's compiler looks

LENGTHS = [19, 30, 7, 12, 25]
KINDS = [kind.name for kind in Checkpointing]
CPU = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
WRAPS = {"whole": lambda made: made, "lora": adapted}


def taught(made, found):
    torch.manual_seed(3)  # of dropout
    value = loss.summed(made, whole(found))
    value.backward()
    return value.item(), gradients(made)


def check_same(compose, wrap, pack_into, *words):
    """An installed model has the loss and gradients of the same one left alone."""
    way, found = "muster_varlen" if pack_into else "sdpa", rows(LENGTHS, pack_into)
    first, second = (WRAPS[wrap](network(attention=way)) for _ in range(2))
    names = [name for name, _ in first.named_parameters()]
    expected, slopes = taught(first, found)
    prepare.install(second, compose(*words), CPU)
    assert [name for name, _ in second.named_parameters()] == names
    value, gradient = taught(second, found)
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(gradient, slopes, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("pack_into", [None, 40])
def test_recomputation_changes_no_gradient(compose, kind, wrap, pack_into):
    check_same(compose, wrap, pack_into, f"train.activation_checkpointing={kind}")


@pytest.mark.proof
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("wrap", "pack_into"), [("whole", None), ("lora", 40)])
def test_compilation_changes_no_gradient(compose, kind, wrap, pack_into):
    torch._dynamo.reset()  # code compiled for one test must not be another's
    check_same(compose, wrap, pack_into, f"train.activation_checkpointing={kind}", "train.compile=true")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "selective"])
def test_compiled_pieces_change_no_gradient(compose, kind, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compile, "_compiles", lambda world: True)
    check_same(compose, "lora", None, f"train.activation_checkpointing={kind}", "parallel=zero3", "adapter=lora")


def test_pieces_are_norms_and_gated_products():
    llama, wrapped = (blocks(made)[0] for made in (network(), adapted(network())))
    assert fused_ops.fuse(llama, lambda forward: forward) == fused_ops.fuse(wrapped, lambda forward: forward) == 3
    assert fused_ops.fuse(torch.nn.Sequential(torch.nn.Linear(4, 4)), lambda forward: forward) == 0
    llama.mlp.forward = lambda x: llama.mlp.down_proj(llama.mlp.gate_proj(x) * llama.mlp.up_proj(x))  # without a gate
    assert fused_ops.fuse(llama, lambda forward: forward) == 2


@pytest.mark.parametrize("kind", ["selective", "full", "offload"])
def test_what_is_dropped_at_random_is_dropped_again(compose, kind):
    first, second = (adapted(network(), dropout=0.5) for _ in range(2))
    expected, slopes = taught(first, rows(LENGTHS))
    prepare.install(second, compose(f"train.activation_checkpointing={kind}"), CPU)
    value, gradient = taught(second, rows(LENGTHS))
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(gradient, slopes, 1e-5)


class Products(TorchDispatchMode):
    """Counts matrix products and attention."""

    def __init__(self):
        super().__init__()
        self.mm = self.attention = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.mm += name == "aten::mm"
        self.attention += name == "aten::_scaled_dot_product_flash_attention_for_cpu"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "products", "attentions"),
    [("none", 0, 0), ("selective", 2 * 3, 0), ("full", 2 * 6, 2), ("offload", 2 * 6, 2)],
)
def test_backward_computes_again_what_was_not_kept(compose, kind, products, attentions):
    """Of seven products in a block, selective computes three again; the last is needed by no gradient, so full computes six."""
    found = []
    for mode in ("none", kind):
        made = network()
        prepare.install(made, compose(f"train.activation_checkpointing={mode}"), CPU)
        value = loss.summed(made, whole(rows(LENGTHS)))
        with Products() as counted:
            value.backward()
        found.append((counted.mm, counted.attention))
    assert found[1][0] - found[0][0] == products
    assert found[1][1] - found[0][1] == attentions


def test_evaluation_recomputes_nothing(compose):
    made = network()
    expected = loss.summed(made, whole(rows(LENGTHS)))
    prepare.install(made, compose("train.activation_checkpointing=full"), CPU)
    with torch.no_grad():
        assert loss.summed(made, whole(rows(LENGTHS))).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("words", "device", "triton", "expected"),
    [
        ([], "cuda", True, True),
        ([], "cuda", False, False),
        ([], "cpu", True, False),
        (["parallel=zero2"], "cuda", True, True),
        (["parallel=zero3"], "cuda", True, True),
        (["parallel=zero3", "adapter=lora"], "cuda", True, False),
        (["parallel=zero3", "adapter=lora", "train.compile=true"], "cuda", True, True),
        (["train.compile=false"], "cuda", True, False),
        (["train.compile=true"], "cpu", False, True),
    ],
)
def test_blocks_are_compiled_where_it_pays(compose, words, device, triton, expected, monkeypatch):
    monkeypatch.setattr(compile, "find_spec", lambda name: triton or None)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device(device))
    assert compile.is_compiled(compose(*words), world) is expected
    in_pieces = words == ["parallel=zero3", "adapter=lora"]
    assert compile.has_pieces(compose(*words), world) is in_pieces


def _sharded(rank, words, config):
    """Two ranks with other rows, one of which trains nothing in the second batch: the gradient's norm is that of one process."""
    with process_group(config) as world:
        backend = backends.import_backend(config)
        engine = backend.wrap(build.build(config), config, world)
        batches = [rows([9, 14, 11], None), rows([5, 12], None, trained=0.5 * (rank == 0))]
        for number, found in enumerate(batches, 1):
            batch = whole(found)
            backend.backward(engine, loss.summed(engine.module, batch) / 10, last=number == len(batches))
        norm = backend.step(engine, 0.0)
        alone = build.build(config)
        for share in (0.5, 0.0):
            for found in (rows([9, 14, 11], None), rows([5, 12], None, trained=share)):
                (loss.summed(alone, whole(found)) / 20).backward()
        trained = [item.grad for item in alone.parameters() if item.requires_grad]
        assert norm == pytest.approx(torch.nn.utils.get_total_norm(trained).item(), rel=1e-4), words


HEAD = ["adapter=lora", "adapter.targets=[q_proj,lm_head]"]
COMBINED = [
    ["parallel=fsdp", "train.activation_checkpointing=selective"],
    ["parallel=fsdp", "train.activation_checkpointing=offload", *HEAD],
    ["parallel=zero2", "train.activation_checkpointing=full", "adapter=lora"],
    ["parallel=zero3", "train.activation_checkpointing=selective"],
    ["parallel=zero3", "train.activation_checkpointing=full", *HEAD],
]


@pytest.mark.proof
@pytest.mark.parametrize("words", COMBINED, ids=" ".join)
def test_sharded_models_compute_the_same(compose, words):
    config = compose(*words, "cluster.train.ranks_per_node=2", "train.global_batch=4", "train.micro_batch=1",
                     "train.max_grad_norm=0", "train.precision=fp32", "train.compile=false")  # fmt: skip
    spawn(_sharded, 2, words, config)


@pytest.mark.proof
@pytest.mark.parametrize("layout", ["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_sharded_models_may_be_compiled(compose, layout, adapter):
    words = [f"parallel={layout}", f"adapter={adapter}", "train.compile=true"]
    config = compose(*words, "cluster.train.ranks_per_node=2", "train.global_batch=4", "train.micro_batch=1",
                     "train.max_grad_norm=0", "train.precision=fp32")  # fmt: skip
    spawn(_sharded, 2, words, config)


def _unbroken(rank, config):
    compile._compiles = lambda world: True
    torch.compile = partial(torch.compile, backend="eager")  # the compiler behind it is not asked
    torch._dynamo.reset()
    counters.clear()
    with process_group(config) as world:
        engine = backends.import_backend(config).wrap(build.skeleton(config), config, world)
        loss.summed(engine.module, whole(rows([9, 14, 11], None))).backward()
    adapted = config.adapter.kind is not AdapterKind.none
    # one code for all blocks, or a second where no gradient goes in; the loss; gated products, where these are compiled alone
    assert counters["frames"]["ok"] == 2 + adapted + compile.has_pieces(config, world)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "adapter"),
    [
        ("fsdp", "none"),
        ("ddp", "none"),
        ("zero3", "none"),
        ("fsdp", "lora"),
        ("ddp", "lora"),
        ("zero3", "lora"),
        ("ddp", "lora_float8"),
    ],  # PEFT's DoRA is not traced
)
def test_no_hook_cuts_what_is_compiled(compose, layout, adapter):
    words = [f"parallel={layout}", f"adapter={adapter}", "train.precision=bf16"]
    spawn(_unbroken, 2, compose(*words, "cluster.train.ranks_per_node=2", "train.global_batch=4"))


def _in_pieces(rank, words, config):
    compile._compiles = lambda world: True
    _sharded(rank, words, config)


@pytest.mark.proof
def test_compiled_pieces_are_right_under_zero3(compose):
    words = ["parallel=zero3", "adapter=lora"]
    config = compose(*words, "cluster.train.ranks_per_node=2", "train.global_batch=4", "train.micro_batch=1",
                     "train.max_grad_norm=0", "train.precision=fp32")  # fmt: skip
    spawn(_in_pieces, 2, words, config)


def _scarce(rank, config):
    from jobs.backends import zero

    planned = zero.derived.plan
    room = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 10**4,
        "stage3_max_reuse_distance": 10**4,
    }

    def plan(*arguments):
        found = planned(*arguments)
        found["zero_optimization"] |= room | {"stage3_prefetch_bucket_size": 10**4}
        return found

    zero.derived.plan = plan
    with process_group(config) as world:
        engine = zero.wrap(build.build(config), config, world)
        for _ in range(3):  # what is gathered ahead is known from the second on
            zero.backward(engine, loss.summed(engine.module, whole(rows([9, 14, 11], None))) / 10, last=True)
            norm = zero.step(engine, 0.0)
        alone = build.build(config)
        (loss.summed(alone, whole(rows([9, 14, 11], None))) / 10).backward()
        trained = [item.grad for item in alone.parameters() if item.requires_grad]
        assert norm == pytest.approx(torch.nn.utils.get_total_norm(trained).item(), rel=1e-4)


def test_what_is_gathered_may_differ_when_a_block_is_recomputed(compose):
    """With room for few parameters ZeRO-3 gathers and frees inside a block, in recomputation not as in forward."""
    words = ["parallel=zero3", "adapter=lora", "train.activation_checkpointing=selective"]
    config = compose(*words, "cluster.train.ranks_per_node=2", "train.global_batch=2", "train.micro_batch=1",
                     "train.max_grad_norm=0", "train.precision=fp32")  # fmt: skip
    spawn(_scarce, 2, config)


def test_blocks_are_found_under_adapters():
    assert len(blocks(adapted(network()))) == 2
