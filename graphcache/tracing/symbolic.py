"""One trace for many sizes: what it gives at a size is a graph of that size, and trusted once it has computed
the model's own bits.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import StepGraph, fake_mode, value_of
from graphcache.libraries.quiet import quiet_shapes
from graphcache.libraries.torch_private import FakeTensorMode
from graphcache.tracing.capture import capture
from graphcache.tracing.descriptions import Descriptions
from graphcache.tracing.functional import erase_unread
from graphcache.tracing.kept_symbols import kept_symbols
from graphcache.tracing.real_call import really_called
from graphcache.tracing.sized_call import SizedCall

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv


@dataclass(frozen=True)
class Symbolic:
    """A model's step with symbols for sizes.

    Attributes:
        call: the traced one.
        step: the graph; some of its nodes compute sizes.
        output: the structure of the model's result.
        guards: what tracing asked of the sizes, as Python.
        environment: evaluates it.
    """

    call: SizedCall
    step: StepGraph
    output: OutputSpec
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
            step, output, _ = capture(model, call, (*unmarked, *call.stand_ins()), symbols=True)
        values: list[Any] = [value_of(node) for node in step.placeholders()]
        environment = fake_mode(values[0]).shape_env
        if step.opaque or environment is None:
            raise CaptureError("calls that were not traced stand in the graph")
        guards = environment.produce_guards_expression(values, ignore_static=False)
        environment.fake_tensor_cache.clear()  # PyTorch keeps environments for good
        return Symbolic(call, step, output, guards or "True", environment)

    def at(self, model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]) -> StepGraph | None:
        """The graph at the sizes of a call; None where it would not be right.

        The model is called once, and so is the graph: a symbol that became a constant, and of which tracing
        says nothing, shows in the operations or in the bits.
        """
        sized = SizedCall.made_of(call, as_sizes=bool(self.call.sizes))
        given = [*tensors, *sized.stand_ins()]
        if sized.template != self.call.template or not self._allows(given):
            return None
        with torch.inference_mode(False), torch.no_grad(), quiet_shapes():
            try:
                step = self._filled(given, call)
            except Exception:  # whatever an operation says of sizes that do not fit
                return None
        called = really_called(model, call, tensors)
        try:
            return step if called.is_that_of(step.module) else None
        except Exception:  # as above
            return None

    def _allows(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether it is right at these sizes, as far as tracing says."""
        return bool(self.environment.evaluate_guards_expression(self.guards, list(tensors)))

    def elsewhere(
        self, tensors: Sequence[torch.Tensor], smaller: bool
    ) -> tuple[CallSpec, list[torch.Tensor]] | None:
        """A call at other sizes and its tensors, each changed in its own way, where tracing allows any.

        What stands together in a dimension stays together, such as the real words before the padding.
        `smaller`: rather lowered than raised.
        """
        shapes: list[Sequence[Any]] = [value_of(node).shape for node in self.step.placeholders()]
        sizes = [size.node for shape in shapes for size in shape if isinstance(size, torch.SymInt)]
        now = {size.expr: size.hint for size in sizes if size.expr.is_Symbol}
        found = dict(now)
        for symbol in now:
            taken = {relation for other in now for relation in _relations(found[other], now[other])}
            others = (
                size
                for size in _others(now[symbol], smaller)
                if taken.isdisjoint(_relations(size, now[symbol]))
            )
            size = next(others)
            # some are only said to be equal in a guard
            alike = [other for other in now if now[other] == now[symbol] and found[other] == now[other]]
            for changed in ([symbol], alike):
                trial = {**found, **dict.fromkeys(changed, size)}
                shaped = [torch.empty(shape, device="meta") for shape in _at(shapes, trial)]
                if symbol in alike and self._allows(shaped):
                    found = trial
                    break
        if found == now:
            return None
        resized = list(map(_resized, (*tensors, *self.call.stand_ins()), _at(shapes, found)))
        return self.call.at(resized), resized[: self.call.tensors]

    def _filled(self, tensors: Sequence[torch.Tensor], call: CallSpec) -> StepGraph:
        """The graph with numbers for symbols, every value described anew."""
        graph, env, values = fx.Graph(), dict[fx.Node, Any](), dict[fx.Node, Any]()
        given = iter(tensors)
        with FakeTensorMode() as mode:
            known = Descriptions(mode)
            for node in self.step.graph.nodes:
                if node.op == "output":
                    graph.output(fx.map_arg(node.args[0], env.__getitem__))
                    break
                value = values[node] = self._value(node, values, given, known)
                if not isinstance(value, torch.Tensor | list | tuple):
                    env[node] = value
                    continue
                made = env[node] = graph.create_node(node.op, node.target, name=node.name)
                made.args = fx.map_arg(node.args, env.__getitem__)
                if node.kwargs:  # setting one of them walks both
                    made.kwargs = fx.map_arg(node.kwargs, env.__getitem__)
                made.meta = {**node.meta, "val": value}
        erase_unread(graph)
        ports = call.ports()
        for size in graph.find_nodes(op="placeholder")[len(ports) :]:
            graph.erase_node(size)
        return replace(self.step, graph=graph, inputs=ports)

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], given: Any, known: Descriptions) -> Any:
        if node.op == "placeholder":
            return known.tensor(next(given))
        if node.op == "get_attr":
            return known.tensor(attrgetter(str(node.target))(self.step.root))
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        target: Any = node.target
        return known.result(target, args, kwargs)


def _others(size: int, smaller: bool) -> Iterator[int]:
    """Other sizes, in steps of a power of two that models may divide by, the smaller ones down to a half."""
    unit = min(16, 1 << max(0, (size // 4).bit_length() - 1))
    if smaller:
        yield from (less for less in range(size - unit, 1, -unit) if 2 * less >= size)
    yield from itertools.count(size + unit, unit)


def _relations(size: int, before: int) -> tuple[Fraction, int]:
    """What two sizes must not have in common: one would be taken for the other times or plus a number."""
    return Fraction(size, before), size - before


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


def _resized(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    for dim, (before, after) in enumerate(zip(tensor.shape, shape, strict=True)):
        if before != after:
            rows = torch.arange(after, device=tensor.device) * before // after
            tensor = tensor.index_select(dim, rows)
    return tensor
