"""Which sizes of a call a trace with symbols leaves free, and what fixes the others."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphcache.ir.call import CallSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import value_of
from graphcache.tracing.explanation import is_user_code
from graphcache.tracing.sized_call import SizedCall
from graphcache.tracing.symbolic import Symbolic

_SOURCE = re.compile(r"\]\[(\d+)\]\.size\(\)\[(\d+)\]$")
_ONE = "PyTorch takes a size of 1 for a constant: a class of its own"


@dataclass(frozen=True)
class Dimension:
    """One size of a call.

    Attributes:
        argument: whose, by path.
        place: which of its dimensions; None where the argument is a number.
        size: in this call.
        symbol: dimensions that have the same one always agree; empty where the size is fixed.
        reason: what fixes it, with the line where that is known; empty where it is free.
    """

    argument: str
    place: int | None
    size: int
    symbol: str
    reason: str

    @property
    def is_free(self) -> bool:
        """Whether one trace serves other sizes."""
        return not self.reason

    def __str__(self) -> str:
        what = self.argument if self.place is None else f"{self.argument}[{self.place}]"
        return f"{what}: {self.size}, {f'any ({self.symbol})' if self.is_free else f'fixed: {self.reason}'}"


@dataclass(frozen=True)
class FreeSizes:
    """The sizes of a call; `refusal` says why each is traced by itself, where that is so."""

    dimensions: tuple[Dimension, ...] = ()
    refusal: str = ""

    @staticmethod
    def of(model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]) -> "FreeSizes":
        """Trace a call with symbols for its sizes, and say of each whether it stayed one.

        Args:
            model: in eval mode.
            call: how the tensors make up the call.
            tensors: its leaves, contiguous.
        """
        try:
            found = _Found(Symbolic.of(model, call, tensors))
        except CaptureError as error:
            return FreeSizes(refusal=f"with symbols for sizes {error}")
        dimensions = [
            Dimension(call.leaf_names[leaf], place, int(size), *found.of(leaf, place, int(size)))
            for leaf, tensor in enumerate(tensors)
            for place, size in enumerate(tensor.shape)
        ]
        sized = SizedCall.made_of(call, as_sizes=found.has_numbers)
        for leaf, number in enumerate(sized.sizes, sized.tensors):
            dimensions.append(Dimension(sized.leaf_names[leaf], None, number, *found.of(leaf, 0, number)))
        return FreeSizes(tuple(dimensions))

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each, for people."""
        if self.refusal:
            return (f"each size is traced by itself: {self.refusal}",)
        return tuple(map(str, self.dimensions))


class _Found:
    """What a trace says of sizes: `places` are the symbols that they were at first, and `has_numbers` whether
    it took whole numbers for sizes.
    """

    def __init__(self, trace: Symbolic) -> None:
        environment: Any = trace.environment
        self._environment = environment
        self.has_numbers = bool(trace.call.sizes)
        self._shapes = [value_of(node).shape for node in trace.step.placeholders()]
        self._places: dict[tuple[int, int], Any] = {}
        for symbol, sources in environment.var_to_sources.items():
            for source in sources:
                name = source.name if isinstance(source.name, str) else source.name()
                if place := _SOURCE.search(name):
                    self._places[int(place[1]), int(place[2])] = symbol

    def of(self, leaf: int, place: int, size: int) -> tuple[str, str]:
        """The symbol of a dimension, and what fixes it; one of both is empty."""
        now: Any = self._shapes[leaf][place]
        is_symbol = isinstance(now, torch.SymInt) and not now.node.expr.is_number
        first = now.node.expr if is_symbol else self._places.get((leaf, place))
        reason = _ONE if size == 1 else self._reason(first)
        if is_symbol and not reason:
            return str(now), ""
        return "", reason or "the model makes a constant of it"

    def _reason(self, symbol: Any) -> str:
        """The first thing that was asked of a symbol and that one number alone answers."""
        for guard in self._environment.guards:
            asked = guard.expr
            is_equation = asked.func.__name__ == "Equality" and any(side.is_Integer for side in asked.args)
            if is_equation and asked.free_symbols == {symbol}:
                return f"{asked.lhs} = {asked.rhs} {_where(guard.sloc)}"
        return ""


def _where(place: Any) -> str:
    frame = getattr(place, "framework_loc", None)
    if frame is None or not hasattr(frame, "filename"):
        return "is asked for"
    if is_user_code(frame.filename):
        return f"is asked for by {frame.filename}:{frame.lineno} in {frame.name}"
    is_hidden = frame.name.startswith("_")
    return "is asked for" if is_hidden else f"is what PyTorch's {frame.name.removeprefix('meta_')} needs"
