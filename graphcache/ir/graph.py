"""The one container of a graph, captured and specialised alike."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx, nn

from graphcache.ir.errors import GraphCacheError
from graphcache.ir.history import History
from graphcache.ir.home import Home
from graphcache.ir.opaque import Opaque
from graphcache.ir.selector import STEM
from graphcache.libraries.torch_private import (
    FakeTensor,
    FakeTensorMode,
    make_graph_module,
    use_lazy_graph_module,
)

LINEAR = "linear"
"""The mark in `meta` of an operation of another library that is a linear layer: rows by a fixed matrix."""
PARTS = "parts."
"""How the names begin of the tensors that the model's weights are made of, `parts.<weight>.<attribute>`."""
InputKind = Literal["latent", "timestep", "constant"]


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor leaf of the model's call; `index` counts the leaves in signature order.

    `constant` inputs are expected to keep their identity over the steps of a generation.
    """

    kind: InputKind
    index: int
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Hoisted:
    """A value that the prologue computes once per generation; `name` is its node there."""

    name: str

    def __str__(self) -> str:
        return f"hoisted {self.name}"


@dataclass(frozen=True, slots=True)
class CacheRead:
    """Entry of a history: `entry` 0 is the newest raw value, `part` tells a site's tensors apart.

    An `optional` one is read as zeros where nothing is cached yet; one that is `changed` is written to in
    place.
    """

    history: History
    part: int
    entry: int
    optional: bool = False
    changed: bool = False

    def __str__(self) -> str:
        suffix = " if any" * self.optional + " changed in place" * self.changed
        return f"read {self.history} part {self.part} entry {self.entry}{suffix}"


@dataclass(frozen=True, slots=True)
class CacheWrite:
    """A raw value, handed to the runner as its history's newest entry."""

    history: History
    part: int

    def __str__(self) -> str:
        return f"write {self.history} part {self.part}"


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One step's forecast weights, newest entry first: fp32, shape (entries,)."""

    group: int

    def __str__(self) -> str:
        return f"coefficients {self.group}"


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor leaf of the model's result."""

    index: int

    def __str__(self) -> str:
        return f"output {self.index}"


@dataclass(frozen=True, slots=True)
class Table:
    """A constant of the split in frequency: a real Fourier basis or the disc of the low band.

    `basis`: the 2·radius + 1 lowest frequencies of `size` samples, shape (2·radius + 1, size).
    `disc`: 1 where a pair of frequencies is in the low band, shape (2·radius + 1, 2·radius + 1).
    """

    kind: Literal["basis", "disc"]
    size: int
    radius: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.size} radius {self.radius}"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens of a site that a step computes: their places in the stream, int64 (rows, budget).

    `clusters`: for each token of the stream the cluster that it is in, int64 (rows, tokens).
    """

    history: History
    clusters: bool = False

    def __str__(self) -> str:
        return f"{'clusters' if self.clusters else 'chosen tokens'} of {self.history}"


InPort = Input | Hoisted | CacheRead | Coefficients | Table | Chosen
OutPort = Output | CacheWrite | Hoisted


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch: the site of one residual add.

    `value` is the node that the branch itself produced, before gate, dropout and casts; `merge` the
    residual add; `stream` the add's other operand. `block` counts blocks in execution order and
    `depth` is its fraction, 0 for the first block and 1 for the last. A stem, outside of the blocks, has
    block −1 and depth 0 before them or 1 behind.
    """

    name: str
    role: str
    context: bool
    block: int
    depth: float
    value: str
    merge: str
    stream: str


def block_count(branches: Iterable[Branch]) -> int:
    """Number of blocks that hold one of the branches; stems are in none."""
    return len({branch.block for branch in branches if branch.role != STEM})


@dataclass(frozen=True)
class StepGraph:
    """A pure graph of one model evaluation, its typed ports, its branches and the passes behind it.

    `root` holds the weights that the graph names; every graph of a model shares one. `opaque` are the calls
    of modules that were not traced, which the graph's operations name by numbers. `homes` are those of
    weights that are kept elsewhere, by the identity of what stands for them in `root`. `packed` are the
    shapes of the model's weights that are made of several tensors, of which the graph names these.
    """

    root: nn.Module
    graph: fx.Graph
    inputs: tuple[InPort, ...]
    outputs: tuple[OutPort, ...]
    branches: tuple[Branch, ...] = ()
    passes: tuple[str, ...] = ()
    opaque: tuple[Opaque, ...] = ()
    homes: Mapping[int, Home] = field(default_factory=dict)
    packed: Mapping[str, torch.Size] = field(default_factory=dict)

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph as a module: code is generated when first asked for, not after every pass."""
        return fx.GraphModule(self.root, self.graph)

    @property
    def block_branches(self) -> tuple[Branch, ...]:
        """The branches that stand in blocks: all but stems."""
        return tuple(branch for branch in self.branches if branch.role != STEM)

    @property
    def blocks(self) -> int:
        """Number of blocks that hold a branch."""
        return block_count(self.branches)

    def placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    def results(self) -> tuple[fx.Node, ...]:
        """The nodes that the graph returns, one per output port."""
        results: Any = self.graph.output_node().args[0]
        return tuple(results)

    def ports(self) -> Iterator[tuple[InPort, fx.Node]]:
        return zip(self.inputs, self.placeholders(), strict=True)

    def nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph.nodes}

    def calls(self) -> list[fx.Node]:
        """The operations, in order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def rebuilt(self, graph: fx.Graph, **changes: Any) -> "StepGraph":
        """This graph with `graph` in place of its own; attributes are shared, never copied."""
        graph.lint()
        return replace(self, graph=graph, **changes)

    def copy(self) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        """A copy of the graph to change, and the map from old nodes to new ones; names are kept."""
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            # arguments given at once are searched for symbolic sizes, a third of the time of a copy
            made = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
            made.args = fx.map_arg(node.args, env.__getitem__)
            if node.kwargs:  # setting one of them walks both
                made.kwargs = fx.map_arg(node.kwargs, env.__getitem__)
            made.meta = dict(node.meta)
            env[node] = made
        return graph, env


def weights_of(held: Mapping[str, Any], graph: fx.Graph) -> nn.Module:
    """A module that holds what a graph names; no code is written for it."""
    with use_lazy_graph_module(True):
        made: nn.Module = make_graph_module(dict(held), graph)
    return made


def value_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor that describes a node's result."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise GraphCacheError(f"node {node.name} ({node.target}) yields {type(value).__name__}, not a tensor")
    return value


def fake_mode(value: torch.Tensor) -> FakeTensorMode:
    """The mode in which a node's fake tensor was made, to make others beside it."""
    if not isinstance(value, FakeTensor):
        raise GraphCacheError(f"{type(value).__name__} describes no node of a captured graph")
    return value.fake_mode


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def has_static_shape(node: fx.Node) -> bool:
    """Whether a tensor's shape is known at capture; one that depends on data (`nonzero`) is not."""
    return all(isinstance(size, int) for size in value_of(node).shape)


def storage_bytes(value: torch.Tensor) -> int:
    """Bytes of a tensor kept dense: a kept view is cloned, so its own elements count."""
    return value.numel() * value.element_size()


def as_bytes(tensor: torch.Tensor) -> bytes:
    """All values of a tensor, bit for bit; waits for the device."""
    data: bytes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors have one dtype and shape, and the same bits; waits for the device."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return torch.equal(ours, theirs) or as_bytes(ours) == as_bytes(theirs)


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What code is made for of a tensor: dtype, device, shape and strides."""
    strides = tensor.stride() if tensor.layout == torch.strided else None
    return tensor.dtype, tensor.device, tensor.shape, strides


def same_sizes(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether sizes are known to be equal; of those that depend on data that may be unknown."""
    return len(ours) == len(theirs) and all(
        _is_known(one == other) for one, other in zip(ours, theirs, strict=True)
    )


def may_be_same_sizes(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether sizes are not known to differ."""
    return len(ours) == len(theirs) and not any(
        _is_known(one != other) for one, other in zip(ours, theirs, strict=True)
    )


def _is_known(claim: Any) -> bool:
    if isinstance(claim, bool):
        return claim
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(claim)


def has_symbolic_shapes(step: StepGraph) -> bool:
    """Whether some shape depends on data."""
    return any(is_tensor(node) and not has_static_shape(node) for node in step.graph.nodes)
