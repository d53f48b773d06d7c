"""What a slice of a concatenation depends on: the rows it takes, not the whole."""

from typing import Any

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import Dataflow
from graphcache.ir.graph import is_tensor, value_of

aten = ops.aten
SPLITS = (
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
_ELEMENTWISE = (aten.add.Tensor, aten.mul.Tensor, *ops.COPIES)


def rows_depend(flow: Dataflow, node: fx.Node, kinds: int) -> bool:
    """Whether the rows that `node` takes out of concatenated streams depend on inputs of `kinds`."""
    taken = taken_rows(node)
    if taken is None:
        if ops.is_view(node) or node.target in ops.COPIES:
            return rows_depend(flow, node.all_input_nodes[0], kinds)
        return bool(flow.depends[node] & kinds)
    source, dim, start, stop = taken
    return _range_depends(flow, source, dim, start, stop, kinds)


def _range_depends(flow: Dataflow, node: fx.Node, dim: int, start: int, stop: int, kinds: int) -> bool:
    if node.target is aten.cat.default:
        return _operand_depends(flow, node, dim, start, stop, kinds)
    if node.target in _ELEMENTWISE:
        same = [n for n in node.all_input_nodes if is_tensor(n) and value_of(n).shape == value_of(node).shape]
        rest = [n for n in node.all_input_nodes if n not in same]
        return any(_range_depends(flow, n, dim, start, stop, kinds) for n in same) or any(
            flow.depends[n] & kinds for n in rest
        )
    return bool(flow.depends[node] & kinds)


def _operand_depends(flow: Dataflow, node: fx.Node, dim: int, start: int, stop: int, kinds: int) -> bool:
    pieces: Any = node.args[0]
    if ops.integer(node, 1, default=0) % value_of(node).dim() != dim:
        return any(_range_depends(flow, piece, dim, start, stop, kinds) for piece in pieces)
    offset = 0
    for piece in pieces:
        size = int(value_of(piece).shape[dim])
        first, last = max(start, offset), min(stop, offset + size)
        if first < last and _range_depends(flow, piece, dim, first - offset, last - offset, kinds):
            return True
        offset += size
    return False


def taken_rows(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """(source, dim, start, stop) of a plain slice or of one piece of a split."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    arguments: list[Any] = list(node.args)
    dims = value_of(node).dim()
    if node.target is aten.narrow.default:
        source, dim, start, count = arguments
        start += value_of(source).shape[dim] if start < 0 else 0
        arguments = [source, dim, start, start + count]
    if node.target in (aten.slice.Tensor, aten.narrow.default):
        arguments += (0, 0, 2**62, 1)[len(arguments) - 1 :]
        source, dim, start, stop, step = arguments
        size = value_of(source).shape[dim]
        if not all(isinstance(number, int) for number in (start or 0, stop, size)) or step != 1:
            return None  # which rows these are depends on data, or some are left out
        return source, dim % dims, *_bounds(start, stop, size)
    split = arguments[0] if arguments else None
    if isinstance(split, fx.Node) and split.target in SPLITS:
        pieces: list[Any] = list(split.args)
        dim = pieces[2] if len(pieces) > 2 else 0
        sizes = [int(piece.shape[dim]) for piece in split.meta["val"]]
        first = sum(sizes[: arguments[1]])
        return pieces[0], dim % dims, first, first + sizes[arguments[1]]
    return None


def written_rows(node: fx.Node) -> tuple[int, int, int]:
    """(start, stop, step) of what a `slice_scatter` writes over."""
    arguments: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]]
    dim, start, stop, step = arguments[2:]
    size = int(value_of(node).shape[dim])
    return *_bounds(start, size if stop is None else stop, size), step


def _bounds(start: int | None, stop: int, size: int) -> tuple[int, int]:
    first, last = (min(bound + size if bound < 0 else bound, size) for bound in (start or 0, stop))
    return first, last
