"""The calls that a pipeline makes of its denoiser, for the sizes of its own calls."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphcache.ir.errors import GraphCacheError
from graphcache.runtime.recorded import calls_told
from graphcache.runtime.transform import Transformed


def record_calls(
    pipe: Any, held: nn.Module, model: nn.Module, sizes: Sequence[Any]
) -> list[Mapping[str, Any]]:
    """The keyword arguments of every call of a model in short runs of a pipeline.

    Args:
        pipe: a pipeline.
        held: what it calls: the model, or a transformed one of it.
        model: the original.
        sizes: keyword arguments of the pipeline.

    Raises:
        GraphCacheError: the pipeline fails, or does not call the model.
    """
    seen: list[Mapping[str, Any]] = []
    for size in sizes:
        before = len(seen)
        try:
            with torch.no_grad(), _undisturbed(held), calls_told([model], lambda _, call: seen.append(call)):
                pipe(**{"num_inference_steps": 2, **size})
        except Exception as error:
            raise GraphCacheError(
                f"the pipeline failed for {dict(size)}: {error}; sizes= of a pipeline are keyword arguments "
                "of its own, such as dict(prompt='a fox', height=512, width=512)"
            ) from error
        if len(seen) == before:
            raise GraphCacheError("the pipeline never called the model that is to be packaged")
    return seen


def _undisturbed(held: nn.Module) -> Any:
    """Within it a transformed model runs as the original does."""
    return held.disabled() if isinstance(held, Transformed) else contextlib.nullcontext()
