"""Changes of tensors that tracing does not see: those made through `.data`."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from graphcache.ir.errors import CaptureError

_DATA: Any = torch.Tensor.data
_READ, _REPLACED = _DATA.__get__, _DATA.__set__


class SeenWrites(TorchFunctionMode):
    """Within it `tensor.data` is the tensor without its gradient, so that what is written there is traced.

    Raises:
        CaptureError: forward gives a tensor other data.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _READ:
            return torch.Tensor.detach(args[0])
        if func == _REPLACED:
            raise CaptureError(
                "the model's forward puts another tensor behind one by assigning to its `.data`, which "
                "cannot be traced; use the other tensor itself, or `.copy_()` for one that forward made"
            )
        return func(*args, **(kwargs or {}))
