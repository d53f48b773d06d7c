"""One trace for many sizes, with symbols for them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphcache.ir.call import CallSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import fake_mode, value_of
from graphcache.tracing.capture import capture
from graphcache.tracing.kept_symbols import kept_symbols
from graphcache.tracing.sized_call import SizedCall
from graphcache.tracing.sized_graph import Shapes, SizedGraph, relations

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv


@dataclass(frozen=True, eq=False)
class Symbolic(SizedGraph):
    """A trace of a call.

    Attributes:
        guards: what tracing asked of the sizes, as Python.
        environment: evaluates it.
    """

    guards: str
    environment: "ShapeEnv"

    @staticmethod
    def of(model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]) -> "Symbolic":
        """Trace a call, with symbols for its whole numbers too unless forward takes none there.

        Raises:
            CaptureError: it cannot be traced with symbols.
        """
        sized = SizedCall.made_of(call)
        try:
            return Symbolic._traced(model, sized, tensors)
        except CaptureError:
            if not sized.sizes:
                raise
            return Symbolic._traced(model, SizedCall.made_of(call, as_sizes=False), tensors)

    @staticmethod
    def _traced(model: nn.Module, call: SizedCall, tensors: Sequence[torch.Tensor]) -> "Symbolic":
        # PyTorch leaves marks on the tensors
        unmarked = [tensor.view_as(tensor) for tensor in tensors]
        with kept_symbols(model):
            step, _, _ = capture(model, call, (*unmarked, *call.stand_ins()), symbols=True)
        values: list[Any] = [value_of(node) for node in step.placeholders()]
        environment = fake_mode(values[0]).shape_env
        if step.opaque or environment is None:
            raise CaptureError("calls that were not traced stand in the graph")
        guards = environment.produce_guards_expression(values, ignore_static=False)
        environment.fake_tensor_cache.clear()  # PyTorch keeps environments for good
        # what asserts something of sizes
        step.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        return Symbolic(call, step, guards or "True", environment)

    def allows(self, tensors: Sequence[torch.Tensor]) -> bool:
        return bool(self.environment.evaluate_guards_expression(self.guards, list(tensors)))

    def other_shapes(self, smaller: bool) -> Shapes | None:
        """What stands together in a dimension stays together, such as real words before the padding."""
        shapes: list[Sequence[Any]] = [value_of(node).shape for node in self.step.placeholders()]
        sizes = [size.node for shape in shapes for size in shape if isinstance(size, torch.SymInt)]
        now = {size.expr: size.hint for size in sizes if size.expr.is_Symbol}
        found = dict(now)
        for symbol in now:
            taken = {relation for other in now for relation in relations(found[other], now[other])}
            others = (
                size
                for size in _others(now[symbol], smaller)
                if taken.isdisjoint(relations(size, now[symbol]))
            )
            size = next(others)
            # some are only said to be equal in a guard
            alike = [other for other in now if now[other] == now[symbol] and found[other] == now[other]]
            for changed in ([symbol], alike):
                trial = {**found, **dict.fromkeys(changed, size)}
                shaped = [torch.empty(shape, device="meta") for shape in _at(shapes, trial)]
                if symbol in alike and self.allows(shaped):
                    found = trial
                    break
        return None if found == now else _at(shapes, found)


def _others(size: int, smaller: bool) -> Iterator[int]:
    """Other sizes, in steps of a power of two that models may divide by, the smaller ones down to a half."""
    unit = min(16, 1 << max(0, (size // 4).bit_length() - 1))
    if smaller:
        yield from (less for less in range(size - unit, 1, -unit) if 2 * less >= size)
    yield from itertools.count(size + unit, unit)


def _at(shapes: Sequence[Sequence[Any]], values: Mapping[Any, int]) -> list[tuple[int, ...]]:
    import sympy  # takes longer to import than a package does to load

    numbers = {symbol: sympy.Integer(value) for symbol, value in values.items()}
    return [
        tuple(
            [
                int(size.node.expr.xreplace(numbers)) if isinstance(size, torch.SymInt) else size
                for size in shape
            ]
        )
        for shape in shapes
    ]
