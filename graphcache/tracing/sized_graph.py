"""A graph with symbols for sizes: what it gives at a size is a graph of that size, and trusted once it has
computed the model's own bits.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.ir.graph import StepGraph
from graphcache.libraries.quiet import quiet_shapes
from graphcache.libraries.torch_private import FakeTensorMode
from graphcache.tracing.descriptions import Descriptions
from graphcache.tracing.functional import erase_unread
from graphcache.tracing.real_call import really_called
from graphcache.tracing.sized_call import SizedCall

Shapes = Sequence[tuple[int, ...]]
"""Of a call's tensors, those that stand for its whole numbers included."""


@dataclass(frozen=True, eq=False)
class SizedGraph(ABC):
    """A model's step with symbols for sizes.

    Attributes:
        call: one that it was made of.
        step: the graph; some of its nodes compute sizes.
    """

    call: SizedCall
    step: StepGraph

    def at(
        self, model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]
    ) -> tuple[StepGraph, OutputSpec] | None:
        """The graph at the sizes of a call, and what it gives out; None where it would not be right.

        The model is called once, and so is the graph: a symbol that became a constant, and of which tracing
        says nothing, shows in the operations or in the bits.
        """
        sized = SizedCall.made_of(call, as_sizes=bool(self.call.sizes))
        given = [*tensors, *sized.stand_ins()]
        if sized.template != self.call.template or not self.allows(given):
            return None
        with torch.inference_mode(False), torch.no_grad(), quiet_shapes():
            try:
                step = self._filled(given, call)
            except Exception:  # whatever an operation says of sizes that do not fit
                return None
        called = really_called(model, call, tensors)
        try:
            return (step, called.output) if called.is_that_of(step.module) else None
        except Exception:  # as above
            return None

    def allows(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether it is right at these sizes, as far as is known before it is run."""
        return True

    @abstractmethod
    def other_shapes(self, smaller: bool) -> Shapes | None:
        """Sizes at which it is right too, each changed in its own way; rather lowered than raised."""

    def elsewhere(
        self, tensors: Sequence[torch.Tensor], smaller: bool
    ) -> tuple[CallSpec, list[torch.Tensor]] | None:
        """A call at other sizes and its tensors, where any are known."""
        shapes = self.other_shapes(smaller)
        if shapes is None:
            return None
        resized = list(map(_resized, (*tensors, *self.call.stand_ins()), shapes))
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


@dataclass(frozen=True, eq=False)
class StoredTrace(SizedGraph):
    """A trace that was made for another call, as a file tells it: what it asked of sizes is not in there.

    Attributes:
        others: sizes that it is for, the smallest ones last.
    """

    others: Sequence[Shapes]

    @staticmethod
    def of(call: SizedCall, step: StepGraph, shapes: Sequence[Shapes], now: Shapes) -> "StoredTrace":
        """A trace for calls of this kind.

        Args:
            call: one of them.
            step: the graph.
            shapes: of calls that it is for, the traced one first.
            now: those of the call.

        Raises:
            ValueError: they are no shapes of such calls.
        """
        for one in shapes:
            if [*map(len, one)] != [*map(len, now)] or any(size < 1 for shape in one for size in shape):
                raise ValueError(f"{one} are no shapes of its inputs")
        changes = [_changes(shapes[0], other) for other in shapes[1:]]
        others = [other for other in shapes if _tells_apart(_changes(now, other), changes)]
        return StoredTrace(call, step, others)

    def other_shapes(self, smaller: bool) -> Shapes | None:
        return self.others[-smaller] if self.others else None


Relations = tuple[Fraction, int]


def relations(size: int, before: int) -> Relations:
    """What two sizes must not have in common: one would be taken for the other times or plus a number."""
    return Fraction(size, before), size - before


def _changes(now: Shapes, then: Shapes) -> list[Relations]:
    return [*map(relations, itertools.chain(*then), itertools.chain(*now))]


def _tells_apart(changes: Sequence[Relations], known: Sequence[Sequence[Relations]]) -> bool:
    """Whether sizes change alike only where they do so in all that is known, and some do change."""
    for place, other in itertools.combinations(range(len(changes)), 2):
        for kind in (0, 1):
            is_alike = changes[place][kind] == changes[other][kind]
            if is_alike and any(change[place][kind] != change[other][kind] for change in known):
                return False
    return any(difference for _, difference in changes)


def _resized(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    for dim, (before, after) in enumerate(zip(tensor.shape, shape, strict=True)):
        if before != after:
            rows = torch.arange(after, device=tensor.device) * before // after
            tensor = tensor.index_select(dim, rows)
    return tensor
