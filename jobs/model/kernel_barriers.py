"""Makes torch.compile write the barriers that its GPU kernels lack: without them gradients can be wrong, and no error says so.

A kernel that reduces in a loop may store a tensor in one loop and load it again in the next. Triton may give the store and the
load to other threads, so that a thread loads what another has not stored yet (pytorch/pytorch#190517, triton-lang/triton#10924).
On an H200 with torch 2.11, gradients of Gemma 3's keys were off by 10 % in some steps, by a factor of a thousand in others.
"""

from typing import Any

import torch.compiler.config

TAG = "muster-barriers"
"""Part of the key of torch's cache of compiled code, so that code without barriers is not taken from it."""


def install() -> None:
    """From now on, a kernel waits for all its threads before it loads what it has stored. Call it before the first compilation."""
    from torch._inductor.codegen.triton import TritonKernel

    if TAG in torch.compiler.config.cache_key_tag:
        return
    torch.compiler.config.cache_key_tag += TAG
    load = TritonKernel.load

    def load_after_barrier(kernel: Any, name: str, index: Any) -> Any:
        if name in kernel.cse.invalidated_stores:  # stored in an earlier loop, whose code is in `body` already
            kernel.body.writeline("tl.debug_barrier()")
        return load(kernel, name, index)

    TritonKernel.load = load_after_barrier  # type: ignore[method-assign, assignment]
