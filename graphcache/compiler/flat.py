"""Graphs over a flat table of their weights, or given them."""

from collections.abc import Mapping
from operator import attrgetter

import torch
from torch import fx, nn

from graphcache.ir.graph import StepGraph


def weights_of(step: StepGraph) -> dict[int, torch.Tensor]:
    """The tensors that a graph names, each once, by identity."""
    found = (attrgetter(str(node.target))(step.root) for node in step.graph.find_nodes(op="get_attr"))
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
        value = attrgetter(str(node.target))(step.root)
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
