"""A captured step as data, and back: what a file says is looked up and checked, and never executed."""

import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import msgspec
import torch
from torch import Tensor, fx

from graphcache.ir.call import CallSpec
from graphcache.ir.data import described, tree
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import (
    Branch,
    Output,
    StepGraph,
    has_symbolic_shapes,
    is_tensor,
    value_of,
    weights_of,
)
from graphcache.ir.operations import name_of, operation
from graphcache.ir.tree import Leaf, fill
from graphcache.libraries.torch_private import FakeTensor, FakeTensorMode

_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
"""Of weights and nodes; fx writes them into code."""


class NodeLine(msgspec.Struct, array_like=True):
    """A node; in its arguments leaves stand for other nodes by their places. `module` is the place of the
    innermost module around it, if any.
    """

    op: str
    name: str
    target: str
    args: Any
    kwargs: Any
    module: int | None


class GraphData(msgspec.Struct):
    """A captured step without its values, which are known once it has run.

    `weights` are the tensors that it takes from the model, by their names: places among the model's tensors
    or, from −1 downwards, among those stored beside this.
    """

    modules: list[tuple[str, str]]
    weights: dict[str, int]
    nodes: list[NodeLine]
    branches: list[Branch]
    passes: list[str]
    outputs: int


def graph_data(
    step: StepGraph, places: Mapping[int, int], sized: bool = False
) -> tuple[GraphData, list[Tensor]]:
    """A step as data, and the tensors that have to be stored beside it.

    Args:
        step: as it was captured.
        places: of the model's tensors, by identity.
        sized: some of its nodes may compute sizes.

    Raises:
        CaptureError: there is something in it that data cannot be, such as the call of a module.
    """
    if step.opaque or step.homes or step.packed or (not sized and has_symbolic_shapes(step)):
        raise CaptureError("it calls modules, its weights are packed or kept elsewhere, or its sizes vary")
    if any(
        is_tensor(node) and (value_of(node).is_conj() or value_of(node).is_neg()) for node in step.graph.nodes
    ):
        raise CaptureError("it computes with lazily conjugated values")
    numbers: dict[fx.Node, int] = {}
    modules: dict[tuple[str, str], int] = {}
    weights: dict[str, int] = {}
    stored: list[Tensor] = []

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Leaf(numbers[value])
        if isinstance(value, list):
            return [argument(item) for item in value]
        if isinstance(value, tuple):
            return tuple(argument(item) for item in value)
        return value

    nodes = []
    for node in step.graph.nodes:
        target = name_of(node.target)
        if node.op == "call_function":
            if operation(target) is not node.target:
                raise CaptureError(f"it calls {target}, which is another operation")
        elif node.op == "get_attr" and target not in weights:
            weights[target] = _place(attrgetter(target)(step.root), places, stored)
        stack = node.meta.get("nn_module_stack") or {}
        around = [(key, path) for key, (path, _) in stack.items()][-1:]
        module = modules.setdefault(around[0], len(modules)) if around else None
        given = (
            described(argument(node.args), node.name),
            described({key: argument(item) for key, item in node.kwargs.items()}, node.name),
        )
        numbers[node] = len(numbers)
        nodes.append(NodeLine(node.op, node.name, target, *given, module))
    made = GraphData([*modules], weights, nodes, [*step.branches], [*step.passes], len(step.outputs))
    return made, stored


def _place(value: Any, places: Mapping[int, int], stored: list[Tensor]) -> int:
    if id(value) in places:
        return places[id(value)]
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.requires_grad
    if not is_plain or value.stride() != torch.empty_like(value).stride():
        raise CaptureError(f"it holds a {type(value).__name__} that is no plain tensor")
    stored.append(value)
    return -len(stored)


def step_of(
    data: GraphData,
    call: CallSpec,
    tensors: Sequence[Tensor],
    stored: Sequence[Tensor],
) -> StepGraph:
    """The step that data describes, without descriptions of its values, which `run_described` makes.

    Args:
        data: from a file.
        call: what the graph is for.
        tensors: the model's, in the order of their places.
        stored: those beside the data.

    Raises:
        Exception: of any kind, if the data is not such as `graph_data` makes.
    """
    graph, nodes = fx.Graph(), list[Any]()
    targets = {line.target for line in data.nodes if line.op == "call_function"}
    known = {target: operation(target) for target in targets}
    held = {name: tensors[at] if at >= 0 else stored[-1 - at] for name, at in data.weights.items()}
    for line in data.nodes:
        node = graph.create_node(line.op, _target(line, known), name=line.name)
        node.args = tuple(fill(tree(line.args), nodes))
        node.kwargs = fill(tree(line.kwargs), nodes)
        if line.module is not None:
            key, path = data.modules[line.module]
            node.meta["nn_module_stack"] = {key: (path, "")}
        if node.name != line.name:
            raise ValueError(f"{line.name!r} is no name of a node")
        nodes.append(node)
    graph.lint()
    step = StepGraph(
        weights_of(held, graph),
        graph,
        call.ports(),
        tuple(map(Output, range(data.outputs))),
        tuple(data.branches),
        tuple(data.passes),
    )
    _verify(step)
    return step


def run_described(step: StepGraph, *examples: Tensor) -> tuple[Tensor, ...]:
    """A step's results for a call's tensors, by which its values are described."""
    results: tuple[Tensor, ...] = _Describing(step).run(*examples)
    return results


class _Describing(fx.Interpreter):
    """Runs a graph, and describes what its nodes compute."""

    def __init__(self, step: StepGraph) -> None:
        super().__init__(step.root, graph=step.graph)
        self._mode = FakeTensorMode()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = self._described(result)
        if n.op in ("placeholder", "get_attr"):
            n.meta["val"].requires_grad_(result.requires_grad)  # on which code that is cached depends
        return result

    def _described(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._described, value))
        if not isinstance(value, Tensor):
            return value
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise ValueError(f"{value.layout} or lazily changed tensors")
        sizes, strides, offset = value.shape, value.stride(), value.storage_offset()
        meta = torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
        if offset:
            span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            whole = torch.empty(offset + max(span, 0), dtype=value.dtype, device="meta")
            meta = whole.as_strided(sizes, strides, offset)
        # what a call within the mode comes to, in a quarter of the time
        return FakeTensor(self._mode, meta, value.device)


def _target(line: NodeLine, known: Mapping[str, Any]) -> Any:
    if line.op == "call_function":
        return known[line.target]
    if line.op not in ("placeholder", "get_attr", "output") or not _NAME.fullmatch(line.target):
        raise ValueError(f"{line.op} {line.target!r}")
    if line.op == "placeholder" and line.target != line.name:
        raise ValueError(f"{line.target!r} is no name of an input")
    return line.target


def _verify(step: StepGraph) -> None:
    """What passes rely on and `lint` does not look at."""
    names = step.nodes()
    if len(step.inputs) != len(step.placeholders()) or len(step.outputs) != len(step.results()):
        raise ValueError("as many inputs and outputs as the call has none")
    for branch in step.branches:
        if not {branch.merge, branch.value, branch.stream} <= names.keys():
            raise ValueError(f"branch {branch.name} names a node that is not there")
    for node in step.graph.nodes:
        if node.op == "get_attr" and not isinstance(attrgetter(str(node.target))(step.root), Tensor):
            raise ValueError(f"{node.target} is no tensor")
