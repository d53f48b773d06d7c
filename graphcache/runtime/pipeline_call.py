"""A pipeline's call whose result is a tensor."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graphcache.ir.errors import GraphCacheError


def called(call: Callable[..., Any], pipe: Any, arguments: Mapping[str, Any]) -> Tensor:
    """What a pipeline's call returns, the batch first.

    Raises:
        GraphCacheError: it returns something else than tensors.
    """
    result = call(pipe, return_dict=False, **arguments)[0]
    if isinstance(result, Tensor):
        return result
    if not all(isinstance(item, Tensor) for item in result):
        raise GraphCacheError(
            f"{type(pipe).__name__} returns no tensors for output_type={arguments.get('output_type')!r}: "
            "take 'latent' or 'pt', or give sampler=, a function of (model, sample, steps) that returns the "
            "latents"
        )
    return torch.stack(list(result))
