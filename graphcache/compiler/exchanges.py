"""Exchanges between ranks that gradients pass, and sums over all ranks.

Gradients of ranks add up: that of a value which several ranks hold is the sum of theirs, that of a part of a
value is its rank's. So nothing but what gathers has to exchange anything on the way back, and products of
gradients with values are summed over ranks whatever these hold.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache.ir.ranks import Ranks
from graphcache.libraries.torch_private import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, WAIT


class _Gathered(torch.autograd.Function):
    """All parts, one after the other; each rank gets the sum of what ranks have for its part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, count: int, group: str) -> Tensor:
        ctx.ranks = count, group
        whole: Tensor = WAIT(ALL_GATHER(part, count, group))
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return WAIT(REDUCE_SCATTER(gradient.contiguous(), "sum", *ctx.ranks)), None, None


def _gathered(part: Tensor, count: int, group: str) -> Tensor:
    whole: Tensor = _Gathered.apply(part, count, group)  # type: ignore[no-untyped-call]
    return whole


def _there(value: Tensor) -> Tensor:
    """What was waited for already."""
    return value


DIFFERENTIABLE: Mapping[Any, Callable[..., Tensor]] = {ALL_GATHER: _gathered, WAIT: _there}
"""What stands in for the operations of a graph where it is run with gradients."""


def total(value: Tensor, mesh: Sequence[Ranks]) -> Tensor:
    """The sum over all ranks of a mesh."""
    for ranks in mesh:
        value = WAIT(ALL_REDUCE(value, "sum", ranks.group))
    return value


def is_first(mesh: Sequence[Ranks]) -> bool:
    """Whether this is the rank that speaks for what all of them hold."""
    return not any(ranks.rank for ranks in mesh)
