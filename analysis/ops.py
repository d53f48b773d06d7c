"""What the analyses know about ATen operations: data, not behaviour."""

import operator
from typing import Any

import torch
from torch import fx

from graphcache.ir.graph import LINEAR
from graphcache.ir.opaque import OPAQUE
from graphcache.libraries.torch_private import (
    CPU_ATTENTION,
    EFFICIENT_ATTENTION,
    FLASH_ATTENTION,
    INTEGER_MM,
    SOFTMAX,
    TO_COPY,
    UNSAFE_VIEW,
)

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        UNSAFE_VIEW,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.movedim.int,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.view_as.default,
        aten.expand_as.default,
        aten.swapaxes.default,
    }
)
"""Same elements, another shape."""

COPIES = frozenset(
    {
        aten.clone.default,
        TO_COPY,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.type_as.default,
        aten.lift_fresh_copy.default,
        aten.dropout.default,
    }
)
"""Same elements, another storage or dtype."""

BROADCASTS = frozenset(
    {
        aten.expand.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.tile.default,
    }
)
"""Few elements, repeated."""

SLICES = frozenset(
    {
        operator.getitem,
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.unbind.int,
    }
)
"""Some of the elements."""

LERPS = frozenset({aten.lerp.Scalar, aten.lerp.Tensor})

ADDS = frozenset({aten.add.Tensor, aten.addcmul.default, aten.sub.Tensor, *LERPS})
"""Sums, of which a residual add is one."""

WRITES = frozenset({aten.index_put_.default, aten.copy_.default})
"""What writes into cache entries; captured graphs have no such operation."""

ATTENTION = frozenset({aten.scaled_dot_product_attention.default})

FUSED_ATTENTION = frozenset({CPU_ATTENTION, EFFICIENT_ATTENTION, FLASH_ATTENTION})
"""Kernels that return the log-sum-exp of each query's row beside the result."""

CONTRACTIONS = frozenset(
    {
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.baddbmm.default,
        aten.einsum.default,
        INTEGER_MM,
    }
)
"""Products that are attention when they multiply two activations."""

REDUCTIONS = frozenset(
    {
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.amax.default,
        aten.amin.default,
        aten.var.correction,
        aten.std.correction,
        aten.logsumexp.default,
        aten.linalg_vector_norm.default,
        aten.softmax.int,
        SOFTMAX,
        aten.log_softmax.int,
        aten.glu.default,
    }
)
"""What goes over given dimensions, all of them where none is given."""

HEAVY = (
    ATTENTION
    | CONTRACTIONS
    | {
        aten.linear.default,
        aten.addmm.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
        aten.convolution.default,
        OPAQUE,
    }
)
"""What a cache is for: work that grows with channels or tokens squared."""


def is_view(node: fx.Node) -> bool:
    return node.target in VIEWS


def is_slice(node: fx.Node) -> bool:
    return node.target in SLICES and not is_result_of_call(node)


def is_result_of_call(node: fx.Node) -> bool:
    """Whether the node is a result of a module that was not traced."""
    return node.target is operator.getitem and any(item.target is OPAQUE for item in node.all_input_nodes)


def integer(node: fx.Node, place: int, default: int | None = None) -> int:
    """A positional argument that counts or names a dimension; the default, if any, where it is left out."""
    left_out = default is not None and len(node.args) <= place
    value: Any = default if left_out else node.args[place]
    return int(value)


def dimension(node: fx.Node, place: int, rank: int) -> int:
    """The dimension that an operation takes apart or joins along, as a number of at least 0."""
    given: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return int(given) % rank


def reduced_dimensions(node: fx.Node, rank: int) -> set[int]:
    """The dimensions over which one of `REDUCTIONS` goes."""
    place = 2 if node.target is aten.linalg_vector_norm.default else 1
    default = -1 if node.target is aten.glu.default else None
    given: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", default)
    given = list(range(rank)) if given is None or given == [] else given
    return {dim % rank for dim in ([given] if isinstance(given, int) else given)}


def behind(node: fx.Node, targets: frozenset[object]) -> fx.Node:
    """The value that a chain of the given operations starts from."""
    while node.target in targets and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def is_product(node: fx.Node) -> bool:
    """Whether the node is real work; an einsum over one operand only permutes."""
    if node.target is aten.einsum.default:
        return len(operands(node)) > 1
    return node.target in HEAVY or bool(node.meta.get(LINEAR))


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that a product multiplies; of an opaque call those that it is given."""
    if node.target is OPAQUE:
        given: Any = node.args[1]
        return list(given)
    first = node.args[0]
    if node.target is aten.einsum.default:
        tensors: Any = node.args[1]
        return [item for item in tensors if isinstance(item, fx.Node)]
    count = 3 if node.target in ATTENTION or node.target is aten.baddbmm.default else 2
    return [item for item in (first, *node.args[1:count]) if isinstance(item, fx.Node)]
