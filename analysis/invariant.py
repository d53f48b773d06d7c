"""Values that do not change over the steps of a generation, and which of them to keep."""

from collections.abc import Collection

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import Input, StepGraph, has_static_shape, is_tensor, storage_bytes, value_of


def invariant_values(step: StepGraph, varying: Collection[int] = ()) -> tuple[str, ...]:
    """Nodes to compute once per generation, by name and in graph order.

    A value is invariant when it depends on neither latents nor timestep nor an input in `varying`
    (leaf indices seen to change within a generation). Views and broadcasts of it stay in the step, where
    they cost little; what they repeat is kept instead. So do weights that are kept in fewer bits than they
    are computed with.
    """
    fixed = _invariant(step, varying)
    unpacked = _unpacked(step)
    frontier = [
        node for node in step.graph.nodes if node in fixed and any(user not in fixed for user in node.users)
    ]
    kept: set[fx.Node] = set()
    todo, seen = frontier, set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node in unpacked:
            continue
        if is_tensor(node) and not _is_cheap(node):
            kept.add(node)
        else:
            todo.extend(node.all_input_nodes)
    return tuple(node.name for node in step.graph.nodes if node in kept)


def _invariant(step: StepGraph, varying: Collection[int]) -> set[fx.Node]:
    fixed: set[fx.Node] = set()
    for port, node in step.ports():
        if isinstance(port, Input) and port.kind == "constant" and port.index not in varying:
            fixed.add(node)
    for node in step.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and all(operand in fixed for operand in node.all_input_nodes)
        ):
            fixed.add(node)
    return fixed


def _unpacked(step: StepGraph) -> set[fx.Node]:
    """What is larger than the weights of fewer bits that it is computed from, and from nothing else."""
    sources: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in step.graph.nodes:
        if node.op == "get_attr" and is_tensor(node):
            sources[node] = frozenset([node])
        elif node.op == "call_function" and all(operand in sources for operand in node.all_input_nodes):
            sources[node] = frozenset[fx.Node]().union(*map(sources.__getitem__, node.all_input_nodes))
    return {node for node, weights in sources.items() if is_tensor(node) and _is_larger(node, weights)}


def _is_larger(node: fx.Node, weights: Collection[fx.Node]) -> bool:
    held = [value_of(weight) for weight in weights]
    packed = any(weight.element_size() == 1 and weight.dtype is not torch.bool for weight in held)
    return packed and has_static_shape(node) and storage_bytes(value_of(node)) > sum(map(storage_bytes, held))


def _is_cheap(node: fx.Node) -> bool:
    """Cheaper to compute again than to hold: a view, or elementwise work that grows by broadcasting."""
    if ops.is_view(node) or ops.is_slice(node) or node.target in ops.BROADCASTS:
        return True
    operands = [item for item in node.all_input_nodes if is_tensor(item)]
    if ops.is_product(node) or not operands or not all(map(has_static_shape, (node, *operands))):
        return False
    held = sum(storage_bytes(value_of(item)) for item in operands)
    return storage_bytes(value_of(node)) > 2 * held
