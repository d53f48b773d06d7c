"""Attention whose kernel a model chooses by itself."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from torch.overrides import TorchFunctionMode

from graphcache.ir.errors import CaptureError
from graphcache.libraries.torch_private import (
    allowed_kernels,
    chosen_kernel,
    kernel_priority,
    set_kernel_priority,
)


def attention_kernels() -> tuple[Any, ...]:
    """What PyTorch's attention may use at present, and which it prefers."""
    cuda: Any = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        *kernel_priority(),
    )


class ChosenKernels(TorchFunctionMode):
    """Refuses a restriction of attention's kernels within forward that leads to another kernel.

    A graph's attention goes by the kernels that are allowed around it, so the restriction is lost. It does
    no harm where PyTorch takes the same kernel with it as without.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outside = attention_kernels()
        self._allowed = allowed_kernels(with_priority=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and attention_kernels() != self._outside:
            inside, order = chosen_kernel(*args, **kwargs), kernel_priority()
            with sdpa_kernel(self._allowed, set_priority=True):
                outside = chosen_kernel(*args, **kwargs)
            set_kernel_priority(order)  # PyTorch puts those back in front that are allowed here
            if inside != outside:
                raise CaptureError(
                    "the model restricts attention to some of PyTorch's kernels inside its forward, and "
                    "would run another one without that; a graph would lose it: choose them around the whole "
                    "generation, `with torch.nn.attention.sdpa_kernel(...):` (diffusers: "
                    "model.reset_attention_backend())"
                )
        return func(*args, **kwargs)
