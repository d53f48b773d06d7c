"""Graphs over a flat table of their weights, or given them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from graphcache.ir.graph import StepGraph


def weights_of(step: StepGraph) -> dict[int, torch.Tensor]:
    """The tensors that a graph names, each once, by identity."""
    found = (_attribute(step.root, str(node.target)) for node in step.graph.find_nodes(op="get_attr"))
    return {id(value): value for value in found if isinstance(value, torch.Tensor)}


def flattened(step: StepGraph, inputs: Mapping[int, torch.Tensor]) -> fx.GraphModule:
    """The same graph over one flat table of its weights: a fetch costs one look-up, not a path's.

    Those of `inputs` are further inputs, in their order.
    """
    graph, _ = step.copy()
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        ports = {key: graph.placeholder(f"given_{i}") for i, key in enumerate(inputs)}
    root, names = nn.Module(), dict[str, str]()
    for node in list(graph.find_nodes(op="get_attr")):
        value = _attribute(step.root, str(node.target))
        if id(value) in ports:
            node.replace_all_uses_with(ports[id(value)])
            graph.erase_node(node)
            continue
        node.target = names.setdefault(str(node.target), f"weight_{len(names)}")
        if isinstance(value, nn.Parameter):
            root.register_parameter(node.target, value)
        elif isinstance(value, torch.Tensor):
            root.register_buffer(node.target, value)
        else:
            setattr(root, node.target, value)
    return fx.GraphModule(root, graph)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
