"""Exchanges between ranks that gradients pass, and sums over all ranks.

Gradients of ranks add up: that of a value which several ranks hold is the sum of theirs, that of a part of a
value is its rank's. So nothing but what gathers has to exchange anything on the way back, and products of
gradients with values are summed over ranks whatever these hold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graphcache.ir.errors import StateError
from graphcache.ir.ranks import Ranks
from graphcache.libraries.torch_private import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, WAIT

aten = torch.ops.aten


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


class _Sent(torch.autograd.Function):
    """A piece for every rank, and one from each; gradients go back to where the pieces came from."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        ctx.ways = sent, received, group
        found: Tensor = WAIT(ALL_TO_ALL(pieces, received, sent, group))
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return WAIT(ALL_TO_ALL(gradient.contiguous(), *ctx.ways)), None, None, None


def _sent(pieces: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    found: Tensor = _Sent.apply(pieces, received, sent, group)  # type: ignore[no-untyped-call]
    return found


class _Written(torch.autograd.Function):
    """Values that are written to where indices say; those that go to one entry share its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shape: Sequence[int], *indices: Tensor) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*indices)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        indices, one = ctx.saved_tensors, gradient.new_ones(())
        times = gradient.new_zeros(ctx.shape).index_put_(indices, one, accumulate=True)[indices]
        further = [1] * (gradient.dim() - times.dim())
        return gradient / times.reshape(*times.shape, *further), None, *(None for _ in indices)


def _written(
    into: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    """A copy with values written into it. A rank may write what it has several times, which is once."""
    places = [index for index in indices if index is not None and index.dtype == torch.int64]
    if not accumulate and len(places) == len(indices) and values.requires_grad:
        shape = torch.broadcast_tensors(*places)[0].shape  # type: ignore[no-untyped-call]
        values = values.expand(*shape, *into.shape[len(places) :])
        values = _Written.apply(values, into.shape[: len(places)], *places)  # type: ignore[no-untyped-call]
    result: Tensor = aten.index_put.default(into, indices, values, accumulate)
    return result


def _there(value: Tensor) -> Tensor:
    """What was waited for already."""
    return value


DIFFERENTIABLE: Mapping[Any, Callable[..., Tensor]] = {
    ALL_GATHER: _gathered,
    ALL_TO_ALL: _sent,
    WAIT: _there,
    aten.index_put.default: _written,
}
"""What stands in for the operations of a graph where it is run with gradients."""
ON_THE_WAY_BACK = "on the way back from a generation's result"


def total(value: Tensor, mesh: Sequence[Ranks]) -> Tensor:
    """The sum over all ranks of a mesh."""
    for ranks in mesh:
        value = WAIT(ALL_REDUCE(value, "sum", ranks.group))
    return value


@contextmanager
def answered(when: str) -> Iterator[None]:
    """Within, a rank that is gone is a StateError on all that wait for it, which says when that was."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise StateError(
            f"a rank of the mesh is gone, or did not answer in time, {when}: end all ranks and begin anew "
            f"({str(error).splitlines()[0]})"
        ) from error


def is_first(mesh: Sequence[Ranks]) -> bool:
    """Whether this is the rank that speaks for what all of them hold."""
    return not any(ranks.rank for ranks in mesh)
