"""Values that hold one row for all tokens of a sample, however they were expanded: modulation, no stream."""

from dataclasses import dataclass, field

from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import is_tensor, value_of
from graphcache.ir.opaque import OPAQUE

aten = ops.aten

_TOKENWISE = (
    ops.VIEWS
    | ops.COPIES
    | ops.BROADCASTS
    | ops.SLICES
    | {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.addcmul.default,
        aten.neg.default,
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.linear.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
    }
)
"""Operations that make equal rows of equal rows."""

_LIKE = frozenset({aten.expand_as.default, aten.view_as.default, aten.type_as.default})
"""Operations that take no more than the shape or dtype of their second operand."""

_FILLED = frozenset(
    {
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
    }
)
"""Operations that repeat one number."""


@dataclass
class Spread:
    """Tells values with one row a sample from those with a row for each token; `batch` is the samples."""

    batch: int
    known: dict[fx.Node, bool] = field(default_factory=dict)

    def is_vector(self, node: fx.Node) -> bool:
        """Whether the shape has room for no more than one row a sample, or one for all samples."""
        # a size that depends on values is none that could be compared
        sizes = [size if isinstance(size, int) else None for size in value_of(node).shape]
        sizes = [size for size in sizes if size != 1]
        if self.batch in sizes:
            sizes.remove(self.batch)
        return len(sizes) <= 1

    def __call__(self, node: fx.Node) -> bool:
        """Whether all tokens of a sample have the same row."""
        if node not in self.known:
            self.known[node] = self._decide(node)
        return self.known[node]

    def _decide(self, node: fx.Node) -> bool:
        if not is_tensor(node):
            return node.target is not OPAQUE and all(self(item) for item in node.all_input_nodes)
        if self.is_vector(node) or node.target in _FILLED:
            return True
        if node.target not in _TOKENWISE:
            return False
        operands = node.all_input_nodes
        if node.target is aten.linear.default or node.target in _LIKE:
            operands = operands[:1]
        if ops.is_view(node) and node.target is not aten.expand_as.default and self.is_vector(operands[0]):
            return False  # a vector cut up into the rows of several tokens
        return all(self(item) for item in operands)
