"""Recomputation and compilation change the cost of a step, but neither its results nor the names of parameters."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch._inductor.codegen.common import CSE
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode

from conf.choices import AdapterKind, Checkpointing
from conf.errors import ConfigError
from jobs import backends
from jobs.distributed.process_group import World, process_group
from jobs.model import build, compile, fused_ops, kernel_barriers, prepare
from jobs.model.build import blocks
from jobs.training import loss
from tests.conftest import Compose
from tests.jobs.networks import adapted, check_equal, gradients, network, rows, whole
from tests.jobs.ranks import spawn

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's compiler looks

LENGTHS = [19, 30, 7, 12, 25]
KINDS = [kind.name for kind in Checkpointing]
CPU = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
WRAPS = {"whole": lambda model: model, "lora": adapted}


def loss_and_gradients(model, all_rows):
    torch.manual_seed(3)  # for dropout
    value = loss.summed_cross_entropy(model, whole(all_rows))
    value.backward()
    return value.item(), gradients(model)


def check_same(compose: Compose, wrap, pack_into, *overrides) -> None:
    """A prepared model has the same loss and gradients as the same model without preparation."""
    attention, all_rows = "muster_varlen" if pack_into else "sdpa", rows(LENGTHS, pack_into)
    first, second = (WRAPS[wrap](network(attention=attention)) for _ in range(2))
    names = [name for name, _ in first.named_parameters()]
    expected, expected_gradients = loss_and_gradients(first, all_rows)
    prepare.prepare_model(second, compose(*overrides), CPU)
    assert [name for name, _ in second.named_parameters()] == names
    value, actual = loss_and_gradients(second, all_rows)
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(actual, expected_gradients, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("pack_into", [None, 40])
def test_recomputation_changes_no_gradient(compose: Compose, kind, wrap, pack_into) -> None:
    check_same(compose, wrap, pack_into, f"train.activation_checkpointing={kind}")


REENTRANT = ["train.activation_checkpointing=full", "train.reentrant_checkpointing=true"]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("pack_into", [None, 40])
def test_reentrant_recomputation_changes_no_gradient(compose: Compose, wrap, pack_into) -> None:
    check_same(compose, wrap, pack_into, *REENTRANT)


def test_reentrant_recomputation_says_which_gradients_it_would_lose(compose: Compose) -> None:
    model = network()
    block, gate = blocks(model)[1], torch.nn.Parameter(torch.ones(64))
    plain = block.forward
    block.forward = lambda hidden, gates=None, **others: plain(hidden * (gates[0] if gates else 1), **others)
    prepare.prepare_model(model, compose(*REENTRANT), CPU)
    hidden = torch.ones(1, 3, 64, requires_grad=True)
    with pytest.raises(ConfigError, match="train.reentrant_checkpointing=true: .*Set it to false"):
        block.forward(hidden, gates=[gate])


@pytest.mark.proof
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("wrap", "pack_into"), [("whole", None), ("lora", 40)])
def test_compilation_changes_no_gradient(compose: Compose, kind, wrap, pack_into) -> None:
    torch._dynamo.reset()  # code compiled for one test must not be another's
    check_same(compose, wrap, pack_into, f"train.activation_checkpointing={kind}", "train.compile=true")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.proof), "selective"])
def test_compiled_ops_change_no_gradient(compose: Compose, kind, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compile, "_can_compile", lambda world: True)
    check_same(compose, "lora", None, f"train.activation_checkpointing={kind}", "parallel=zero3", "adapter=lora")


def test_norms_and_gated_activations_are_fused() -> None:
    llama, wrapped = (blocks(model)[0] for model in (network(), adapted(network())))
    assert fused_ops.fuse(llama, lambda forward: forward) == fused_ops.fuse(wrapped, lambda forward: forward) == 3
    assert fused_ops.fuse(torch.nn.Sequential(torch.nn.Linear(4, 4)), lambda forward: forward) == 0
    llama.mlp.forward = lambda x: llama.mlp.down_proj(llama.mlp.gate_proj(x) * llama.mlp.up_proj(x))  # without a gate
    assert fused_ops.fuse(llama, lambda forward: forward) == 2


@pytest.mark.parametrize("kind", ["selective", "full", "offload", "full reentrant"])
def test_recomputation_repeats_the_same_dropout(compose: Compose, kind) -> None:
    first, second = (adapted(network(), dropout=0.5) for _ in range(2))
    expected, expected_gradients = loss_and_gradients(first, rows(LENGTHS))
    mode, *reentrant = kind.split()
    words = [f"train.activation_checkpointing={mode}", f"train.reentrant_checkpointing={bool(reentrant)}"]
    prepare.prepare_model(second, compose(*words), CPU)
    value, actual = loss_and_gradients(second, rows(LENGTHS))
    assert value == pytest.approx(expected, rel=1e-6)
    check_equal(actual, expected_gradients, 1e-5)


class Products(TorchDispatchMode):
    """Counts matrix products and attention operators."""

    def __init__(self) -> None:
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
def test_backward_recomputes_what_was_not_saved(compose: Compose, kind, products, attentions) -> None:
    """A block has seven products. Selective recomputes three; full recomputes six, because no gradient needs the last one."""
    counts = []
    for mode in ("none", kind):
        model = network()
        prepare.prepare_model(model, compose(f"train.activation_checkpointing={mode}"), CPU)
        value = loss.summed_cross_entropy(model, whole(rows(LENGTHS)))
        with Products() as counted:
            value.backward()
        counts.append((counted.mm, counted.attention))
    assert counts[1][0] - counts[0][0] == products
    assert counts[1][1] - counts[0][1] == attentions


def test_evaluation_recomputes_nothing(compose: Compose) -> None:
    model = network()
    expected = loss.summed_cross_entropy(model, whole(rows(LENGTHS)))
    prepare.prepare_model(model, compose("train.activation_checkpointing=full"), CPU)
    with torch.no_grad():
        assert loss.summed_cross_entropy(model, whole(rows(LENGTHS))).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "device", "triton", "expected"),
    [
        ([], "cuda", True, True),
        ([], "cuda", False, False),
        ([], "cpu", True, False),
        (["parallel=zero2"], "cuda", True, True),
        (["parallel=zero3"], "cuda", True, True),
        (["parallel=zero3", "adapter=lora"], "cuda", True, False),
        (["parallel=zero3", "adapter=lora", "train.compile=true"], "cuda", True, True),
        (["model.attention=flex"], "cuda", True, False),
        (["train.compile=false"], "cuda", True, False),
        (["train.compile=true"], "cpu", False, True),
    ],
)
def test_blocks_are_compiled_by_default_on_gpus_with_triton(
    compose: Compose, overrides, device, triton, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "find_spec", lambda name: triton or None)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device(device))
    assert compile.compiles_blocks(compose(*overrides), world) is expected
    compiles_ops = overrides in (["parallel=zero3", "adapter=lora"], ["model.attention=flex"])
    assert compile.compiles_fused_ops(compose(*overrides), world) is compiles_ops


def _sharded(rank, overrides, config) -> None:
    """Two ranks, one of which has nothing to train in the second batch: the gradient norm equals that of one process."""
    with process_group(config) as world:
        backend = backends.import_backend(config)
        engine = backend.wrap(build.build(config), config, world)
        batches = [rows([9, 14, 11], None), rows([5, 12], None, trained=0.5 * (rank == 0))]
        for number, batch_rows in enumerate(batches, 1):
            batch = whole(batch_rows)
            backend.backward(engine, loss.summed_cross_entropy(engine.module, batch) / 10, last=number == len(batches))
        norm = backend.step(engine, 0.0)
        alone = build.build(config)
        for share in (0.5, 0.0):
            for batch_rows in (rows([9, 14, 11], None), rows([5, 12], None, trained=share)):
                (loss.summed_cross_entropy(alone, whole(batch_rows)) / 20).backward()
        trained = [item.grad for item in alone.parameters() if item.requires_grad]
        assert norm == pytest.approx(torch.nn.utils.get_total_norm(trained).item(), rel=1e-4), overrides


HEAD = ["adapter=lora", "adapter.targets=[q_proj,lm_head]"]
COMBINED = [
    ["parallel=fsdp", "train.activation_checkpointing=selective"],
    ["parallel=fsdp", "train.activation_checkpointing=offload", *HEAD],
    ["parallel=zero2", "train.activation_checkpointing=full", "adapter=lora"],
    ["parallel=zero3", "train.activation_checkpointing=selective"],
    ["parallel=zero3", "train.activation_checkpointing=full", *HEAD],
    *(
        [layout, *REENTRANT, adapter]
        for layout in ("parallel=fsdp", "parallel=zero3")
        for adapter in ("adapter=none", "adapter=lora")
    ),
]


@pytest.mark.proof
@pytest.mark.parametrize("overrides", COMBINED, ids=" ".join)
def test_sharded_models_compute_the_same(compose: Compose, overrides) -> None:
    config = compose(*overrides, "cluster.train.ranks_per_node=2", "train.global_batch=4", "train.micro_batch=1",
                     "train.max_grad_norm=0", "train.precision=fp32", "train.compile=false")  # fmt: skip
    spawn(_sharded, 2, overrides, config)


@pytest.mark.proof
@pytest.mark.parametrize("layout", ["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_sharded_models_may_be_compiled(compose: Compose, layout, adapter) -> None:
    overrides = [f"parallel={layout}", f"adapter={adapter}", "train.compile=true"]
    config = compose(*overrides, "cluster.train.ranks_per_node=2", "train.global_batch=4", "train.micro_batch=1",
                     "train.max_grad_norm=0", "train.precision=fp32")  # fmt: skip
    spawn(_sharded, 2, overrides, config)


def _has_no_graph_break(rank, config) -> None:
    compile._can_compile = lambda world: True
    torch.compile = partial(torch.compile, backend="eager")  # only tracing is tested, not code generation
    torch._dynamo.reset()
    counters.clear()
    with process_group(config) as world:
        engine = backends.import_backend(config).wrap(build.build_on_meta(config), config, world)
        loss.summed_cross_entropy(engine.module, whole(rows([9, 14, 11], None))).backward()
    adapted = config.adapter.kind is not AdapterKind.none
    # One graph for all blocks (with adapters two: the first block's input needs no gradient), one for the loss, and one for
    # gated activations if these are compiled alone.
    assert counters["frames"]["ok"] == 2 + adapted + compile.compiles_fused_ops(config, world)
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
def test_no_hook_breaks_a_compiled_graph(compose: Compose, layout, adapter) -> None:
    overrides = [f"parallel={layout}", f"adapter={adapter}", "train.precision=bf16"]
    spawn(_has_no_graph_break, 2, compose(*overrides, "cluster.train.ranks_per_node=2", "train.global_batch=4"))


EXPERTS = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]


def sparse(*targets: str):
    """A mixture of experts, with adapters on `targets`."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model = network("qwen3_moe", **sizes)
    if targets:
        parameters = [name for name in targets if "experts" in name]
        modules = [name for name in targets if name not in parameters]
        lora = LoraConfig(r=2, target_modules=modules, target_parameters=parameters, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model


def compiled_parts(block) -> dict[str, bool]:
    names = {module: name for name, module in block.named_modules()}
    return {names[part]: is_compiled for part, is_compiled in compile.parts(block)}


def test_a_block_is_compiled_whole_or_around_what_cannot_be() -> None:
    assert compiled_parts(blocks(network())[0]) == {"": True}
    assert compiled_parts(blocks(sparse())[0]) == {"": True}
    assert compiled_parts(blocks(sparse("q_proj"))[0]) == {"": True}
    around = {"input_layernorm": True, "self_attn": True, "post_attention_layernorm": True}
    assert compiled_parts(blocks(sparse(*EXPERTS))[0]) == around | {"mlp.gate": True, "mlp.experts": False}
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }
    first, second = blocks(network("qwen3_5_text", head_dim=16, **sizes))
    assert compiled_parts(first) == {
        "input_layernorm": True,
        "linear_attn": False,
        "mlp": True,
        "post_attention_layernorm": True,
    }
    assert compiled_parts(second) == {"": True}


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_adapters_on_experts_train_right_in_compiled_blocks_and_compile_once(
    compose: Compose, kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = whole(rows(LENGTHS))
    expected_model, model = sparse(*EXPERTS), sparse(*EXPERTS)
    with torch.no_grad():
        for one, other in zip(expected_model.parameters(), model.parameters(), strict=True):
            other.copy_(one.normal_(0, 0.1) if one.requires_grad else one)
    expected = loss.summed_cross_entropy(expected_model, batch)
    expected.backward()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # only tracing, not code generation
    torch._dynamo.reset()
    prepare.prepare_model(model, compose("train.compile=true", f"train.activation_checkpointing={kind}"), CPU)
    compiled = []
    for _ in range(3):
        model.zero_grad()
        value = loss.summed_cross_entropy(model, batch)
        value.backward()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[2]
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    check_equal(gradients(model), gradients(expected_model), 1e-5)


def test_a_kernel_waits_before_it_loads_what_it_stored_in_an_earlier_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves need a GPU: benchmarks/families_gpu.py trains models whose gradients are wrong without this."""
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    monkeypatch.setattr(TritonKernel, "load", lambda kernel, name, _: kernel.body.writeline(f"load {name}"))
    kernel_barriers.install()
    kernel_barriers.install()
    lines: list[str] = []
    body = SimpleNamespace(writeline=lines.append)
    kernel = SimpleNamespace(body=body, cse=CSE())
    kernel.cse.store_cache["stored"] = "tmp1"
    TritonKernel.load(kernel, "stored", 0)
    kernel.cse.invalidate(OrderedSet())  # what torch does at the end of a loop
    TritonKernel.load(kernel, "stored", 0)
    TritonKernel.load(kernel, "other", 0)
    assert lines == ["load stored", "tl.debug_barrier()", "load stored", "load other"]
    assert torch.compiler.config.cache_key_tag == kernel_barriers.TAG


def _sharded_with_compiled_ops(rank, overrides, config) -> None:
    compile._can_compile = lambda world: True
    _sharded(rank, overrides, config)


@pytest.mark.proof
def test_compiled_ops_are_right_under_zero3(compose: Compose) -> None:
    overrides = ["parallel=zero3", "adapter=lora"]
    config = compose(*overrides, "cluster.train.ranks_per_node=2", "train.global_batch=4", "train.micro_batch=1",
                     "train.max_grad_norm=0", "train.precision=fp32")  # fmt: skip
    spawn(_sharded_with_compiled_ops, 2, overrides, config)


def _gathers_little(rank, config):
    from jobs.backends import zero

    planned = zero.deepspeed_settings.deepspeed_config
    room = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 10**4,
        "stage3_max_reuse_distance": 10**4,
    }

    def plan(*arguments):
        settings = planned(*arguments)
        settings["zero_optimization"] |= room | {"stage3_prefetch_bucket_size": 10**4}
        return settings

    zero.deepspeed_settings.deepspeed_config = plan
    with process_group(config) as world:
        engine = zero.wrap(build.build(config), config, world)
        for _ in range(3):  # from the second step on, ZeRO-3 knows what to prefetch
            zero.backward(
                engine, loss.summed_cross_entropy(engine.module, whole(rows([9, 14, 11], None))) / 10, last=True
            )
            norm = zero.step(engine, 0.0)
        alone = build.build(config)
        (loss.summed_cross_entropy(alone, whole(rows([9, 14, 11], None))) / 10).backward()
        trained = [item.grad for item in alone.parameters() if item.requires_grad]
        assert norm == pytest.approx(torch.nn.utils.get_total_norm(trained).item(), rel=1e-4)


def test_zero3_may_gather_otherwise_in_recomputation(compose: Compose) -> None:
    """With memory for few parameters, ZeRO-3 gathers and frees inside a block, and not the same in recomputation as in forward."""
    overrides = ["parallel=zero3", "adapter=lora", "train.activation_checkpointing=selective"]
    config = compose(*overrides, "cluster.train.ranks_per_node=2", "train.global_batch=2", "train.micro_batch=1",
                     "train.max_grad_norm=0", "train.precision=fp32")  # fmt: skip
    spawn(_gathers_little, 2, config)


def test_blocks_are_found_under_adapters() -> None:
    assert len(blocks(adapted(network()))) == 2
