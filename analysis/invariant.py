"""Values that do not change over the steps of a generation, and which of them are worth keeping."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.network import Network
from graphcache.ir.graph import Input, StepGraph, has_static_shape, is_tensor, storage_bytes, value_of


def invariant_values(step: StepGraph, varying: Collection[int] = ()) -> tuple[str, ...]:
    """Nodes to compute once per generation, by name and in graph order.

    A value is invariant when it depends on neither latents nor timestep nor an input in `varying`
    (leaf indices seen to change within a generation). Views and broadcasts of it stay in the step, where
    they cost little; what they repeat is kept instead.
    """
    fixed = _invariant(step, varying)
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
        if is_tensor(node) and not _is_cheap(node):
            kept.add(node)
        else:
            todo.extend(node.all_input_nodes)
    return tuple(node.name for node in step.graph.nodes if node in kept)


@dataclass(frozen=True)
class HoistCut:
    """The invariant values to keep, by name and in graph order, and their bytes.

    `by_rule` are the bytes of what `invariant_values` names; sizes that depend on data count 0 in both.
    `reasons` are (node, why) for every invariant value that the step reads.
    """

    kept: tuple[str, ...]
    bytes: int
    by_rule: int
    reasons: tuple[tuple[str, str], ...]


def cheapest_hoist(step: StepGraph, varying: Collection[int] = (), *, pointwise: bool = False) -> HoistCut:
    """The invariant values of fewest bytes of which a step can make all others at little cost.

    The step may repeat what it repeats by the rule of `invariant_values`: views, slices and broadcasts;
    with `pointwise` also casts and elementwise work: less is kept then, more is computed at every step.
    Where many sets have the fewest bytes, values that the step may not repeat go before slices of them.
    A slice that is kept must be copied by who keeps it, or it holds all of what it is a slice of.
    """
    fixed = _invariant(step, varying)
    calls = [node for node in step.graph.nodes if node in fixed and node.op == "call_function"]
    network, reasons = Network(), list[tuple[str, str]]()
    for node in calls:
        _enter(network, node, repeats=_is_repeated(node, pointwise))
        readers = [user for user in node.users if user not in fixed]
        if readers:
            network.sink(node.name)
            reasons.append((node.name, f"{readers[0]} ({readers[0].target}) of the step reads it"))
    chosen, rule = network.cheapest(), set(invariant_values(step, varying))
    kept = [node for node in calls if node.name in chosen]
    by_rule = sum(_bytes(node) for node in calls if node.name in rule)
    return HoistCut(tuple(node.name for node in kept), sum(map(_bytes, kept)), by_rule, tuple(reasons))


def _enter(network: Network, node: fx.Node, repeats: bool) -> None:
    """A value that the step may make again of its operands, or must be given."""
    if not repeats:
        network.node(node.name, _bytes(node))
        network.source(node.name)
        return
    network.node(node.name, _bytes(node) if is_tensor(node) and has_static_shape(node) else None, rank=1)
    for item in node.all_input_nodes:
        if item.op == "call_function":
            network.edge(item.name, node.name)


def _is_repeated(node: fx.Node, pointwise: bool) -> bool:
    if not is_tensor(node) or _is_cheap(node):
        return True
    return pointwise and (
        node.target in ops.COPIES or torch.Tag.pointwise in getattr(node.target, "tags", ())
    )


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


def _is_cheap(node: fx.Node) -> bool:
    """Cheaper to compute again than to hold: a view, or elementwise work that grows by broadcasting."""
    if ops.is_view(node) or ops.is_slice(node) or node.target in ops.BROADCASTS:
        return True
    operands = [item for item in node.all_input_nodes if is_tensor(item)]
    if ops.is_product(node) or not operands or not all(map(has_static_shape, (node, *operands))):
        return False
    held = sum(storage_bytes(value_of(item)) for item in operands)
    return storage_bytes(value_of(node)) > 2 * held


def _bytes(node: fx.Node) -> int:
    return storage_bytes(value_of(node)) if has_static_shape(node) else 0
