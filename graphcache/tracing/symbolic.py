"""One trace for many sizes: what it gives at a size is a graph of that size, and trusted once it has computed
the model's own bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import StepGraph, fake_mode, same_bits, value_of
from graphcache.libraries.quiet import quiet_shapes
from graphcache.libraries.torch_private import FakeTensorMode
from graphcache.tracing.capture import capture
from graphcache.tracing.functional import erase_unread
from graphcache.tracing.numeric_time import run_as_tensors
from graphcache.tracing.plain_tensors import Originals
from graphcache.tracing.rehearsal import rehearse
from graphcache.tracing.undisturbed import undisturbed


@dataclass(frozen=True)
class Symbolic:
    """A model's step with symbols for sizes.

    Attributes:
        step: the graph; some of its nodes compute sizes.
        output: the structure of the model's result.
        guards: what tracing asked of the sizes, as Python.
        environment: evaluates it.
    """

    step: StepGraph
    output: OutputSpec
    guards: str
    environment: ShapeEnv

    @staticmethod
    def of(model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]) -> "Symbolic":
        """Trace a call.

        Raises:
            CaptureError: it cannot be traced with symbols.
        """
        # PyTorch leaves marks on the tensors
        unmarked = tuple([tensor.view_as(tensor) for tensor in tensors])
        step, output, _ = capture(model, call, unmarked, symbols=True)
        values: list[Any] = [value_of(node) for node in step.placeholders()]
        environment = fake_mode(values[0]).shape_env
        if step.opaque or environment is None:
            raise CaptureError("calls that were not traced stand in the graph")
        guards = environment.produce_guards_expression(values, ignore_static=False)
        environment.fake_tensor_cache.clear()  # PyTorch keeps environments for good
        return Symbolic(step, output, guards or "True", environment)

    def at(self, model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]) -> StepGraph | None:
        """The graph at the sizes of a call; None where it would not be right.

        The model is called once, and so is the graph: a symbol that became a constant, and of which tracing
        says nothing, shows in the bits.
        """
        if not self.environment.evaluate_guards_expression(self.guards, list(tensors)):
            return None
        with torch.inference_mode(False), torch.no_grad():
            try:
                with quiet_shapes():
                    step = self._filled(tensors)
                found = step.module(*tensors)
            except Exception:  # whatever an operation says of sizes that do not fit
                return None
            expected = _called(model, call, tensors)
        fits = len(found) == len(expected) and all(map(same_bits, found, expected))
        return step if fits else None

    def _filled(self, tensors: Sequence[torch.Tensor]) -> StepGraph:
        """The graph with numbers for symbols, every value described anew."""
        graph, env, values = fx.Graph(), dict[fx.Node, Any](), dict[fx.Node, Any]()
        given = iter(tensors)
        with FakeTensorMode() as mode:
            for node in self.step.graph.nodes:
                if node.op == "output":
                    graph.output(fx.map_arg(node.args[0], env.__getitem__))
                    break
                value = values[node] = self._value(node, values, given, mode)
                if not isinstance(value, torch.Tensor | list | tuple):
                    env[node] = value
                    continue
                made = env[node] = graph.create_node(node.op, node.target, name=node.name)
                made.args, made.kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                made.meta = {**node.meta, "val": value}
        erase_unread(graph)
        return replace(self.step, graph=graph)

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], given: Any, mode: FakeTensorMode) -> Any:
        if node.op == "placeholder":
            return mode.from_tensor(next(given))
        if node.op == "get_attr":
            return mode.from_tensor(attrgetter(str(node.target))(self.step.root))
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        target: Any = node.target
        return target(*args, **kwargs)


def _called(model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the model computes; it is left as it was."""
    originals, found = Originals(), list[torch.Tensor]()
    plain = [originals.plain(tensor) for tensor in tensors]
    devices = {tensor.device for tensor in (*tensors, *model.parameters())}

    def real() -> None:
        found[:] = OutputSpec.of(*run_as_tensors(call, model, plain))[1]

    undisturbed(model, originals, lambda: rehearse(real, devices), lambda: None)
    return found
