"""A frozen linear layer with a 4-bit or 8-bit weight that FSDP2 and ZeRO-3 can shard, and that is filled slice by slice.

`nf4` and `int8` equal bitsandbytes bit for bit: NF4 in blocks of 64 with double quantization (Dettmers 2023,
arXiv 2305.14314, section 3), and int8 with one scale per row (Dettmers 2022, arXiv 2208.07339). `float8` is e4m3 with one scale
per row; `jobs.model.float8_matmul` multiplies it without dequantizing. Only the storage differs from bitsandbytes. `weight`
is one parameter: the packed bytes viewed as numbers of the dtype of compute. Every backend can shard and gather such a
parameter, and none casts it. The scales (at most 3 % of its size) are buffers, whole on every rank.

Filling takes two steps: each rank calls `QuantizedLinear.load` for its own part of the weight, then all ranks call
`share_scales` together.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from conf.choices import Frozen
from conf.errors import ConfigError, Problem
from conf.precision import LOWEST_CAPABILITY
from jobs.model import float8_matmul, uncalled_layers
from jobs.tensor_io.slices import TensorPart
from jobs.tensor_io.wrapper_names import without_wrappers

BLOCK, NESTED = 64, 256
"""NF4 weights that share a scale, and scales that share a scale of their own: the defaults of bitsandbytes."""


class Packed(NamedTuple):
    """A quantized range of a weight: the packed bytes, and the largest magnitude of each block in fp32."""

    packed: torch.Tensor
    absmax: torch.Tensor


class QuantizedLinear(nn.Linear):
    """A linear layer with a packed, frozen weight. A bias stays as it was."""

    def __init__(self, linear: nn.Linear, kind: Frozen, dtype: torch.dtype) -> None:
        """`dtype` is the dtype of compute; the packed bytes are viewed as numbers of it. The weight is made on the meta device."""
        nn.Module.__init__(self)
        if kind is not Frozen.float8:
            import bitsandbytes  # noqa: F401 -- registers its operators with torch
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.kind, self.dtype, numel = kind, dtype, linear.weight.numel()
        packed = torch.empty(nbytes(kind, numel) // dtype.itemsize, dtype=dtype, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.block = BLOCK if kind is Frozen.nf4 else self.in_features
        for name, shape, scale_dtype in _scale_buffers(kind, numel, self.out_features):
            self.register_buffer(name, torch.empty(shape, dtype=scale_dtype), persistent=False)
        self._local_absmax: tuple[int, torch.Tensor] | None = None
        """Between `load` and `share_scales`: the first block of this rank's part, and the magnitudes of its blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind is Frozen.float8:
            out = float8_matmul.matmul(x, self.weight, self.out_features, *self.scales())
            return out if self.bias is None else out + self.bias
        shape = (self.out_features, self.in_features)
        is_nf4 = self.kind is Frozen.nf4
        return cast(torch.Tensor, quantized_matmul(x, self.weight, self.bias, is_nf4, shape, self.scales()))

    def scales(self) -> tuple[torch.Tensor, ...]:
        """The scale buffers, in the order of `_scale_buffers`."""
        return tuple(buffer for buffer in self._buffers.values() if buffer is not None)

    def load(self, part: TensorPart, read: Callable[[TensorPart], int]) -> int:
        """Fill this rank's `part` of the packed weight. Returns what `read` returns (bytes read).

        `read` fills a TensorPart of the original weight and returns the bytes that it read. It is asked for whole blocks,
        because a shard may begin and end inside a block.
        """
        if not part.destination.numel():
            return 0
        numel = self.out_features * self.in_features
        weights_per_element = self.dtype.itemsize * (2 if self.kind is Frozen.nf4 else 1)  # NF4: two weights in a byte
        end = min(numel, (part.begin + part.destination.numel()) * weights_per_element)
        first_block = part.begin * weights_per_element // self.block
        last_block = -(-end // self.block)
        begin, count = first_block * self.block, (last_block - first_block) * self.block
        original = torch.empty(count, dtype=self.dtype, device=part.destination.device)
        read_bytes = read(TensorPart((self.out_features, self.in_features), begin, original, trained=False))
        packed, absmax = quantize(self.kind, original, self.block)
        skipped = part.begin * self.dtype.itemsize - nbytes(self.kind, begin)
        destination = part.destination.view(torch.uint8)
        destination.copy_(packed[skipped : skipped + destination.numel()])
        self._local_absmax = first_block, absmax
        return read_bytes

    def share_scales(self, device: torch.device) -> None:
        """Gather the scales of all ranks' parts. Collective: all ranks must call it, after each has called `load`.

        `device` is where the packed parts are.
        """
        absmax_of_all = torch.zeros(self.out_features * self.in_features // self.block, device=device)
        if self._local_absmax is not None:
            first_block, absmax = self._local_absmax
            absmax_of_all[first_block : first_block + absmax.numel()] = absmax
            self._local_absmax = None
        if dist.is_initialized():
            # Both ranks that share a block have computed the same value for it, so the maximum is that value.
            dist.all_reduce(absmax_of_all, dist.ReduceOp.MAX)
        for buffer, value in zip(self.scales(), scales(self.kind, absmax_of_all), strict=True):
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
    """Return x @ W.T + bias for a packed W of `shape`, x (..., columns). Backward dequantizes W again for the gradient of x.

    A custom operator, because a compiler looks inside plain Python: it would see that forward and backward dequantize the
    same weight, and keep the dequantized weights of the whole model in memory.
    """
    return F.linear(x, dequantize(weight, nf4, shape, x.dtype, *scales), bias)


@quantized_matmul.register_fake
def _(x: torch.Tensor, _weight: Any, _bias: Any, _nf4: bool, shape: Sequence[int], _scales: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("muster::quantized_matmul_backward", mutates_args=())
def _quantized_matmul_backward(
    grad: torch.Tensor, weight: torch.Tensor, nf4: bool, shape: Sequence[int], scales: Sequence[torch.Tensor]
) -> torch.Tensor:
    return grad @ dequantize(weight, nf4, shape, grad.dtype, *scales)


@_quantized_matmul_backward.register_fake
def _(grad: torch.Tensor, _weight: Any, _nf4: bool, shape: Sequence[int], _scales: Any) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, _, ctx.nf4, ctx.shape, scales = inputs
    ctx.save_for_backward(weight, *scales)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    weight, *scales = ctx.saved_tensors
    grad_of_x = _quantized_matmul_backward(grad, weight, ctx.nf4, ctx.shape, scales)
    return grad_of_x, None, None, None, None, [None] * len(scales)


quantized_matmul.register_autograd(_backward, setup_context=_save_for_backward)


def replace_linears(blocks: list[nn.Module], kind: Frozen, dtype: torch.dtype, *, on_gpu: bool = False) -> None:
    """Replace the linear layers of decoder blocks by quantized ones on the meta device, in place.

    Embedding, output head and routers stay as they are. So do layers whose weight is read without calling them (Mamba), or is
    that of another layer too (Zamba). So do layers with a weight that is not a multiple of 64 elements, and for float8 layers
    with dimensions that the float8 product does not support.

    Raises ConfigError for float8 if the model is for training on a GPU (`on_gpu`) and this machine's GPU has no float8 products.
    """
    # Consolidation of a float8 run also comes here, possibly on a node without GPUs; it multiplies nothing.
    checks_gpu = on_gpu and kind is Frozen.float8 and torch.cuda.is_available()
    if checks_gpu and torch.cuda.get_device_capability() < LOWEST_CAPABILITY["float8"]:
        message = (
            "needs a GPU with float8 products (compute capability 8.9 or later), but this one is "
            f"{torch.cuda.get_device_name()}: set adapter.base=int8"
        )
        raise ConfigError(Problem("adapter.base", kind.name, message))
    owners = Counter(
        id(module.weight) for block in blocks for module in block.modules() if isinstance(module, nn.Linear)
    )
    for block in blocks:
        uncalled = uncalled_layers.find(block)
        for name, module in list(block.named_modules()):
            if type(module) is not nn.Linear or owners[id(module.weight)] > 1 or name in uncalled:
                continue
            if _can_quantize(module, kind):
                parent = block.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], QuantizedLinear(module, kind, dtype))


def _can_quantize(linear: nn.Linear, kind: Frozen) -> bool:
    if kind is Frozen.float8:
        return float8_matmul.supports(linear)
    return linear.weight.numel() % BLOCK == 0


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Name of each packed weight, without wrappers' prefixes -> its layer."""
    return {
        without_wrappers(f"{name}.weight"): module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def share_scales(model: nn.Module, parts: Mapping[str, TensorPart]) -> None:
    """Call `QuantizedLinear.share_scales` of every layer, in the same order on all ranks."""
    for name, layer in quantized_layers(model).items():
        layer.share_scales(parts[name].destination.device)


def quantize(kind: Frozen, original: torch.Tensor, block: int) -> Packed:
    """Quantize a flat range of whole blocks of `block` weights; `original` is in the dtype of compute."""
    if kind is Frozen.float8:
        codes, absmax = float8_matmul.quantize_rows(original.view(-1, block))
        return Packed(codes.view(-1).view(torch.uint8), absmax.view(-1))
    if kind is Frozen.nf4:
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(original, blocksize=BLOCK, quant_type="nf4", quant_storage=torch.uint8)
        return Packed(packed.view(-1), state.absmax)
    rows = original.view(-1, block).float()
    absmax = rows.abs().amax(dim=1)
    packed = (rows * (127 / absmax.clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(1)).round()
    return Packed(packed.to(torch.int8).view(-1).view(torch.uint8), absmax)


def scales(kind: Frozen, absmax: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The scale buffers made from the blocks' largest magnitudes: 8-bit for NF4 (double quantization), else fp32 as they are."""
    if kind is not Frozen.nf4:
        return (absmax,)
    import bitsandbytes.functional as bnb

    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED)
    return codes, state.absmax, state.code, offset


def dequantize(
    weight: torch.Tensor,
    nf4: bool,
    shape: Sequence[int],
    dtype: torch.dtype,
    absmax: torch.Tensor,
    *nested: torch.Tensor,
) -> torch.Tensor:
    """The weight (rows, columns) in `dtype`; `nf4=False` means int8. `absmax` and `nested` are the scale buffers in order."""
    if nf4:
        return dequantize_nf4(weight, _dequantize_absmax(absmax, *nested), shape, dtype)
    return (weight.view(torch.int8).view(shape) * (absmax / 127).unsqueeze(1)).to(dtype)


def dequantize_nf4(
    weight: torch.Tensor, absmax: torch.Tensor, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Dequantize packed NF4 weights with the fp32 magnitudes of their blocks.

    The operator gets one block per row, whatever the shape: bitsandbytes 0.50.2 on CPUs applies wrong scales to blocks that
    extend over the end of a row.
    """
    blocks = (absmax.numel(), BLOCK)
    out: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.view(-1, 1), absmax, BLOCK, "nf4", blocks, dtype
    )
    return out.view(shape)


def double_quantized_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """The magnitudes of all blocks of a weight after double quantization and back, fp32."""
    return _dequantize_absmax(*scales(Frozen.nf4, absmax))


def _dequantize_absmax(
    codes: torch.Tensor, nested_absmax: torch.Tensor, code: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    absmax: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
        codes, nested_absmax, code, NESTED, torch.float32
    )
    return absmax + offset


def nbytes(kind: Frozen, numel: int) -> int:
    """Bytes of `numel` packed weights."""
    return numel // 2 if kind is Frozen.nf4 else numel


def _scale_buffers(kind: Frozen, numel: int, rows: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of the scale buffers, in the order in which `scales` returns them."""
    if kind is not Frozen.nf4:
        return [("absmax", (rows,), torch.float32)]
    blocks = numel // BLOCK
    return [
        ("absmax", (blocks,), torch.uint8),
        ("nested_absmax", (-(-blocks // NESTED),), torch.float32),
        ("nested_code", (256,), torch.float32),
        ("nested_offset", (), torch.float32),
    ]
