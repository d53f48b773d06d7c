"""What a traced graph takes from the model, as attributes of the graph instead of inputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from graphcache.ir.graph import PARTS
from graphcache.libraries.torch_private import is_traceable_wrapper_subclass
from graphcache.tracing.functional import erase_unread

_INNER = torch.ops.export.access_subclass_inner_tensor.default


@dataclass(frozen=True)
class Unlifted:
    """A graph with the caller's tensors as its only inputs.

    `held` are tensors and other things that it takes from the model, by the names of its attributes; `packed`
    the shapes of those weights that stand for others, of which it holds the tensors that they are made of.
    """

    graph: fx.Graph
    held: Mapping[str, Any]
    packed: Mapping[str, torch.Size]


def unlifted(program: Any, exported: fx.Graph, model_state: Mapping[str, Any]) -> Unlifted:
    """A program's graph, which may be rewritten.

    `model_state` are the weights that the model was traced with; a program that was traced again has others
    in the place of those that are made of several tensors.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    held: dict[str, Any] = {}
    parts = _parts(model_state)
    values = {**program.constants, **program.state_dict}
    inputs = list(
        zip(exported.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True)
    )

    def hold(node: fx.Node, name: str, value: Any) -> None:
        held[name] = value
        env[node] = graph.get_attr(name)
        env[node].meta.update(node.meta)

    for node, spec in inputs:
        if spec.kind == InputKind.USER_INPUT:
            env[node] = graph.node_copy(node)
    for node, spec in inputs:
        if node not in env:
            hold(node, *parts.get(spec.target, (spec.target, values[spec.target])))
    for node in exported.find_nodes(op="call_function", target=_INNER):
        whole, attribute = node.args
        outer = str(env[whole].target)
        name = outer if outer.startswith(PARTS) else f"{PARTS}{outer}"
        hold(node, f"{name}.{attribute}", getattr(held[outer], attribute))
    results: Any = graph.graph_copy(exported, env)
    graph.output(tuple(results))
    erase_unread(graph)
    return Unlifted(graph, held, _packed(graph, model_state))


def _packed(graph: fx.Graph, model_state: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The shapes of the weights of which the graph reads parts."""
    found = dict[str, torch.Size]()
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        while name.startswith(PARTS) and name.removeprefix(PARTS) not in model_state:
            name = name.rpartition(".")[0]
        if name.startswith(PARTS):
            name = name.removeprefix(PARTS)
            found[name] = model_state[name].shape
    return found


def _is_made_of_others(value: Any) -> bool:
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


def parts_of(value: Tensor, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of, in the order of `__tensor_flatten__`, or itself."""
    if not _is_made_of_others(value):
        yield name, value
        return
    made: Any = value
    for attribute in made.__tensor_flatten__()[0]:
        yield from parts_of(getattr(value, attribute), f"{name}.{attribute}")


def _parts(model_state: Mapping[str, Any]) -> dict[str, tuple[str, Tensor]]:
    """What stands for the parts of weights in a program that was traced again, by its names there."""
    found: dict[str, tuple[str, Tensor]] = {}
    for path, value in model_state.items():
        if _is_made_of_others(value):
            module, _, name = path.rpartition(".")
            for index, part in enumerate(parts_of(value, f"{PARTS}{path}")):
                found[f"{module}.parametrizations.{name}.original{index}".lstrip(".")] = part
    return found
