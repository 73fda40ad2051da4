"""Frozen linear layers in 4 or 8 bits: how they are kept so that FSDP2 and ZeRO-3 shard them, filled by slices, and multiplied.

The numbers are bitsandbytes' own, bit for bit: NF4 in blocks of 64 with double quantisation (Dettmers 2023, arXiv 2305.14314,
section 3), or int8 with one scale a row (Dettmers 2022, arXiv 2208.07339); or they are e4m3 with one scale a row, which
`jobs.model.float8_matmul` multiplies as they are. What differs is where they stand. `weight` is one parameter, the
packed bytes seen as
numbers of the precision of compute: any backend can cut it, gather it, and never casts it. Its scales, 3 % of its size or less,
are buffers and whole on every rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from conf.choices import Frozen
from conf.errors import ConfigError, Problem
from jobs.model import float8_matmul
from jobs.tensor_io.slices import Part, plain

BLOCK, NESTED = 64, 256
"""Weights that share a scale, and scales that share one of their own: bitsandbytes' defaults."""


class Numbers(NamedTuple):
    """A quantised range of a weight: packed bytes, and the largest magnitude of each block, fp32."""

    packed: torch.Tensor
    absmax: torch.Tensor


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is packed. Frozen; a bias stays as it was."""

    def __init__(self, linear: nn.Linear, kind: Frozen, dtype: torch.dtype) -> None:
        """`dtype`: of compute, in which the packed bytes are kept too. Made without data, like the rest of a skeleton."""
        nn.Module.__init__(self)
        if kind is not Frozen.float8:
            import bitsandbytes  # noqa: F401 -- brings its operators
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.kind, self.dtype, numel = kind, dtype, linear.weight.numel()
        packed = torch.empty(nbytes(kind, numel) // dtype.itemsize, dtype=dtype, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.block = BLOCK if kind is Frozen.nf4 else self.in_features
        for name, shape, of in _scales(kind, numel, self.out_features):
            self.register_buffer(name, torch.empty(shape, dtype=of), persistent=False)
        self._found: tuple[int, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind is Frozen.float8:
            made = float8_matmul.matmul(x, self.weight, self.out_features, *self.scales())
            return made if self.bias is None else made + self.bias
        shape = (self.out_features, self.in_features)
        return cast(
            torch.Tensor, quantized_matmul(x, self.weight, self.bias, self.kind is Frozen.nf4, shape, self.scales())
        )

    def scales(self) -> tuple[torch.Tensor, ...]:
        return tuple(buffer for buffer in self._buffers.values() if buffer is not None)

    def take(self, part: Part, read: Callable[[Part], int]) -> int:
        """Quantise what this rank holds: `part` of the packed weight, from as much of the original as it takes, which `read`
        fills in. Returns what `read` does. Blocks are read whole, so that the cut of a shard may lie anywhere."""
        if not part.into.numel():
            return 0
        numel, each = self.out_features * self.in_features, self.dtype.itemsize * (2 if self.kind is Frozen.nf4 else 1)
        first = part.begin * each // self.block
        last = -(-min(numel, (part.begin + part.into.numel()) * each) // self.block)
        begin, count = first * self.block, (last - first) * self.block
        original = torch.empty(count, dtype=self.dtype, device=part.into.device)
        done = read(Part((self.out_features, self.in_features), begin, original, trained=False))
        packed, absmax = quantize(self.kind, original, self.block)
        skip = part.begin * self.dtype.itemsize - nbytes(self.kind, begin)
        into = part.into.view(torch.uint8)
        into.copy_(packed[skip : skip + into.numel()])
        self._found = first, absmax
        return done

    def share_scales(self, device: torch.device) -> None:
        """Bring the scales together once all ranks have taken their parts; all ranks call this together. `device`: where
        the packed parts are."""
        whole = torch.zeros(self.out_features * self.in_features // self.block, device=device)
        if self._found is not None:
            first, absmax = self._found
            whole[first : first + absmax.numel()] = absmax
            self._found = None
        if dist.is_initialized():
            dist.all_reduce(whole, dist.ReduceOp.MAX)  # a block that two ranks share is equal on both
        for buffer, value in zip(self.scales(), scales(self.kind, whole), strict=True):
            buffer.copy_(value)


@torch.library.custom_op("muster::quantized_matmul", mutates_args=())
def quantized_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    nf4: bool,
    shape: Sequence[int],
    scales: Sequence[torch.Tensor],
) -> torch.Tensor:
    """x @ W.T + bias of a packed W, which is unpacked again for the gradient of x instead of kept.

    An operator, so that a compiler cannot see that both unpack the same: it would keep all of the model unpacked.
    """
    return F.linear(x, dequantize(weight, nf4, shape, x.dtype, *scales), bias)


@quantized_matmul.register_fake
def _(x: torch.Tensor, _weight: Any, _bias: Any, _nf4: bool, shape: Sequence[int], _scales: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("muster::quantized_matmul_backward", mutates_args=())
def _back(
    grad: torch.Tensor, weight: torch.Tensor, nf4: bool, shape: Sequence[int], scales: Sequence[torch.Tensor]
) -> torch.Tensor:
    return grad @ dequantize(weight, nf4, shape, grad.dtype, *scales)


@_back.register_fake
def _(grad: torch.Tensor, _weight: Any, _nf4: bool, shape: Sequence[int], _scales: Any) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, _, ctx.nf4, ctx.shape, scales = inputs
    ctx.save_for_backward(weight, *scales)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    weight, *scales = ctx.saved_tensors
    return _back(grad, weight, ctx.nf4, ctx.shape, scales), None, None, None, None, [None] * len(scales)


quantized_matmul.register_autograd(_backward, setup_context=_keep)


def replace_linears(blocks: list[nn.Module], kind: Frozen, dtype: torch.dtype, *, on_gpu: bool = False) -> None:
    """Let the linear layers of decoder blocks be quantised ones, without data yet. Router, head and embedding stay as they are,
    as do layers whose weights do not fill whole blocks of 64, or under float8 have widths that its product does not take.

    Raises ConfigError for float8 if it is for training on a GPU (`on_gpu`) and the one that is here has no such products.
    """
    seen = on_gpu and kind is Frozen.float8 and torch.cuda.is_available()  # a merge of such a run needs no GPU
    if seen and torch.cuda.get_device_capability() < float8_matmul.CAPABILITY:
        said = (
            f"needs products in 8 bits (compute capability 8.9), which {torch.cuda.get_device_name()} lacks: take int8"
        )
        raise ConfigError(Problem("adapter.base", kind.name, said))
    for block in blocks:
        for name, module in list(block.named_modules()):
            if type(module) is nn.Linear and _fits(module, kind):
                parent = block.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], QuantizedLinear(module, kind, dtype))


def _fits(linear: nn.Linear, kind: Frozen) -> bool:
    if kind is Frozen.float8:
        return float8_matmul.supports(linear)
    return linear.weight.numel() % BLOCK == 0


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Plain name of each packed weight -> its layer."""
    return {
        plain(f"{name}.weight"): module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }


def share_scales(model: nn.Module, held: Mapping[str, Part]) -> None:
    """`QuantizedLinear.share_scales` of every layer, in the same order on all ranks."""
    for name, layer in quantized_layers(model).items():
        layer.share_scales(held[name].into.device)


def quantize(kind: Frozen, original: torch.Tensor, block: int) -> Numbers:
    """Of a flat range of whole blocks, in the precision of compute."""
    if kind is Frozen.float8:
        eighths, absmax = float8_matmul.quantize_rows(original.view(-1, block))
        return Numbers(eighths.view(-1).view(torch.uint8), absmax.view(-1))
    if kind is Frozen.nf4:
        import bitsandbytes.functional as numbers

        packed, state = numbers.quantize_4bit(original, blocksize=BLOCK, quant_type="nf4", quant_storage=torch.uint8)
        return Numbers(packed.view(-1), state.absmax)
    rows = original.view(-1, block).float()
    absmax = rows.abs().amax(dim=1)
    packed = (rows * (127 / absmax.clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(1)).round()
    return Numbers(packed.to(torch.int8).view(-1).view(torch.uint8), absmax)


def scales(kind: Frozen, absmax: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is kept of the blocks' largest magnitudes: in 8 bits for NF4 (double quantisation), else as they are."""
    if kind is not Frozen.nf4:
        return (absmax,)
    import bitsandbytes.functional as numbers

    offset = absmax.mean()
    codes, state = numbers.quantize_blockwise(absmax - offset, blocksize=NESTED)
    return codes, state.absmax, state.code, offset


def dequantize(
    weight: torch.Tensor,
    nf4: bool,
    shape: Sequence[int],
    dtype: torch.dtype,
    absmax: torch.Tensor,
    *nested: torch.Tensor,
) -> torch.Tensor:
    """The weight (rows, columns) in `dtype`."""
    if nf4:
        return dequantize_nf4(weight, _decoded(absmax, *nested), shape, dtype)
    return (weight.view(torch.int8).view(shape) * (absmax / 127).unsqueeze(1)).to(dtype)


def dequantize_nf4(
    weight: torch.Tensor, absmax: torch.Tensor, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """NF4 numbers times their blocks' magnitudes, fp32.

    A block a row, whatever the shape: bitsandbytes 0.50.2 on CPUs gives blocks that reach over the end of a row wrong scales.
    """
    blocks = (absmax.numel(), BLOCK)
    return torch.ops.bitsandbytes.dequantize_4bit.default(weight.view(-1, 1), absmax, BLOCK, "nf4", blocks, dtype).view(
        shape
    )


def double_quantized_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """Magnitudes of all blocks of a weight as double quantisation leaves them, fp32."""
    return _decoded(*scales(Frozen.nf4, absmax))


def _decoded(codes: torch.Tensor, nested: torch.Tensor, code: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return torch.ops.bitsandbytes.dequantize_blockwise.default(codes, nested, code, NESTED, torch.float32) + offset


def nbytes(kind: Frozen, numel: int) -> int:
    """Of `numel` packed weights."""
    return numel // 2 if kind is Frozen.nf4 else numel


def _scales(kind: Frozen, numel: int, rows: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of the buffers, in the order in which `scales` gives them."""
    if kind is not Frozen.nf4:
        return [("absmax", (rows,), torch.float32)]
    blocks = numel // BLOCK
    return [
        ("absmax", (blocks,), torch.uint8),
        ("nested_absmax", (-(-blocks // NESTED),), torch.float32),
        ("nested_code", (256,), torch.float32),
        ("nested_offset", (), torch.float32),
    ]
