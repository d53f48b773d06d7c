"""What operations cost: FLOPs from shapes, two per multiply-add."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import StepGraph, has_static_shape, is_tensor, storage_bytes, value_of
from graphcache.ir.opaque import called
from graphcache.libraries.torch_private import WAIT, tree_leaves

aten = ops.aten


def flops(node: fx.Node) -> int:
    """Floating-point operations of a product; everything else counts 0, as in the papers' figures.

    Attention with queries (…, L, d), keys (…, S, d) and values (…, S, e) takes 2·L·S·(d + e) for each
    batch entry and head. An opaque call takes what a real one took at capture. A fused kernel that is called
    for its log-sum-exp alone scores tokens: it counts 0.
    """
    if node.target in ops.FUSED_ATTENTION:
        return _attention(node) if any(user.args[1] == 0 and user.users for user in node.users) else 0
    call = called(node)
    if call is not None:
        return call.flops
    if node.op != "call_function" or not ops.is_product(node) or not is_tensor(node):
        return 0
    tensors = [item for item in node.all_input_nodes if is_tensor(item)]
    if not all(map(has_static_shape, (node, *tensors))):
        return 0
    out = tuple(value_of(node).shape)
    if node.target in ops.ATTENTION:
        return _attention(node)
    if node.target is aten.einsum.default:
        return _einsum(node)
    return 2 * math.prod(out) * _contracted(node)


def _attention(node: fx.Node) -> int:
    operands = (item for item in node.args[:3] if isinstance(item, fx.Node))
    query, key, value = (tuple(value_of(item).shape) for item in operands)
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def total_flops(nodes: Iterable[fx.Node]) -> int:
    return sum(map(flops, nodes))


def graph_flops(step: StepGraph) -> int:
    """FLOPs of one run of a graph."""
    return total_flops(step.graph.nodes)


def computed_bytes(nodes: Iterable[fx.Node]) -> int:
    """Bytes of all that operations compute, and so about what can be held for their gradients.

    Not counted is what kernels keep aside, as attention by its plain formula does, and reshapes that copy.
    """
    own = (node for node in nodes if node.target is not WAIT)  # which gives what it was given
    return sum(result_bytes(node) for node in own if not ops.is_view(node) and not ops.is_slice(node))


def result_bytes(node: fx.Node) -> int:
    """Bytes of an operation's results, of which those whose sizes depend on data count nothing."""
    tensors = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor)]
    return sum(storage_bytes(t) for t in tensors if all(isinstance(size, int) for size in t.shape))


def _contracted(node: fx.Node) -> int:
    """Terms of the sum behind each element of the result."""
    first, second = (tuple(value_of(item).shape) for item in _pair(node))
    if "conv" in str(node.target):
        return math.prod(second[1:])
    return first[-1]


def _pair(node: fx.Node) -> tuple[Any, Any]:
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        return node.args[1], node.args[2]
    return node.args[0], node.args[1]


def _einsum(node: fx.Node) -> int:
    """Two operands: every index of either runs once for each multiply-add."""
    terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, item in zip(terms, ops.operands(node), strict=True):
        shape = tuple(value_of(item).shape)
        letters = term.replace("...", "")
        dims = shape[len(shape) - len(letters) :]
        sizes.update(zip(letters, dims, strict=True))
        if "..." in term:
            sizes["..."] = math.prod(shape[: len(shape) - len(letters)])
    return 2 * math.prod(sizes.values())
