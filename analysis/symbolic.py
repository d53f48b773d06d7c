"""Shapes, FLOPs and bytes of a graph as expressions in the sizes it was captured at.

A graph is captured at a base and again with one size changed at a time; the captures have the same
operations, so each dimension of each node is a number per capture, and the expression behind the numbers is

    batch^i · (c + Σ over disjoint groups of the other symbols of a · product of the group)

such as `batch·heads` or `text + frames·height·width/4`. The exponent and the slopes follow exactly from the
finite differences; which symbols multiply each other is what fits further captures, where several change.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from graphcache.analysis import cost, ops
from graphcache.analysis.branches import branch_members, owners
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.graph import CacheWrite, Hoisted, StepGraph
from graphcache.ir.schedule import Budget
from graphcache.libraries.torch_private import tree_leaves

BATCH = "batch"
"""The symbol that multiplies whole dimensions; it may be squared, where a dimension folds it twice."""

Shape = tuple[Any, ...]
"""A tensor's dimensions, sympy expressions."""

_MOVES_NOTHING = ops.VIEWS | ops.SLICES | {ops.aten.expand.default}


class CostError(GraphCacheError):
    """Sizes at which a model's cost cannot be told from its captures."""


@dataclass(frozen=True)
class Sized:
    """A graph and the sizes, by symbol, at which it was captured."""

    sizes: Mapping[str, int]
    step: StepGraph


def symbol(name: str) -> Any:
    """The sympy symbol of a size: a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)


class among(sympy.Function):  # type: ignore[misc]
    """`among(tokens, count, multiple)`: the number of tokens that a budget takes, once `tokens` is known."""

    is_integer = True

    @classmethod
    def eval(cls, tokens: Any, count: Any, multiple: Any) -> Any:
        if not tokens.is_Integer:
            return None
        wanted = int(count) if count.is_Integer else float(count)
        return sympy.Integer(Budget(wanted, int(multiple)).among(int(tokens)))


def solve(captures: Sequence[Sized]) -> "SymbolicShapes":
    """An expression for every dimension of every node.

    Args:
        captures: the base, and for each of its symbols a capture that differs in that size alone; any
            further ones, in which several sizes differ, tell sums from products and are checked.

    Raises:
        CostError: the captures run other operations, or a dimension is not of the module's form; the node
            and its site are named.
    """
    base = captures[0]
    pairs = [_paired(base.step, capture) for capture in captures[1:]]
    solver = _Solver(tuple(dict(capture.sizes) for capture in captures))
    shapes: dict[str, tuple[Shape, ...]] = {}
    work: dict[str, Any] = {}
    alone: list[str] = []
    for node in base.step.graph.nodes:
        if node.op == "output":
            continue
        twins = [node, *(pair.get(node, node) for pair in pairs)]
        if any(node not in pair or not _is_same(node, pair[node]) for pair in pairs):
            alone.append(node.name)
        try:
            shapes[node.name] = _shapes(twins, solver)
            work[node.name] = _flops(twins, shapes[node.name], solver)
        except _Unsolved as error:
            if node.name not in alone:
                raise CostError(f"{_where(base.step, node)}: {error}; fix a size in it") from None
            shapes[node.name] = _shapes([node] * len(twins), solver)
            work[node.name] = sympy.Integer(cost.flops(node))
    return SymbolicShapes(base.step, dict(base.sizes), shapes, work, tuple(alone))


@dataclass(frozen=True)
class SymbolicShapes:
    """A graph whose dimensions are expressions in the sizes of its captures; `sizes` are the base's.

    `alone` are values of the weights alone that the captures do not agree on, such as a position table that
    one size reads and another computes: they count as in the base.
    """

    step: StepGraph
    sizes: Mapping[str, int]
    shapes: Mapping[str, tuple[Shape, ...]]
    work: Mapping[str, Any]
    alone: tuple[str, ...] = ()
    _sizes: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def symbols(self) -> dict[str, Any]:
        return {name: symbol(name) for name in self.sizes}

    @cached_property
    def dimensions(self) -> frozenset[Any]:
        """The distinct dimensions; each is a whole number at sizes that the model takes."""
        return frozenset(size for shapes in self.shapes.values() for shape in shapes for size in shape)

    def shape(self, name: str) -> Shape:
        """The dimensions of a node's tensor, of the first one where it yields several."""
        return self.shapes[name][0]

    def flops(self, node: fx.Node) -> Any:
        """FLOPs of one operation, as `analysis.cost` counts them."""
        return self.work.get(node.name, sympy.S.Zero)

    def bytes_moved(self, node: fx.Node) -> Any:
        """Bytes that one operation reads and writes: all its tensors once, nothing for a view."""
        if node.op != "call_function" or node.target in _MOVES_NOTHING:
            return sympy.S.Zero
        return sympy.Add(*(self._bytes(item) for item in (*node.all_input_nodes, node)))

    @cached_property
    def total_flops(self) -> Any:
        """FLOPs of one run of the graph."""
        return sympy.expand(sympy.Add(*self.work.values()))

    @cached_property
    def total_bytes(self) -> Any:
        """Bytes that one run of the graph moves."""
        return sympy.expand(sympy.Add(*map(self.bytes_moved, self.step.calls())))

    def branch_flops(self) -> dict[str, Any]:
        """FLOPs between each branch's stream and its value; what they share is divided."""
        return self._by_branch({node.name: self.flops(node) for node in self.step.calls()})

    def entry_bytes(self, site: str) -> Any:
        """Bytes of one cached value of a branch.

        Raises:
            CostError: the graph has no such branch.
        """
        for branch in self.step.branches:
            if branch.name == site:
                return sympy.expand(self._bytes(self._nodes[branch.value]))
        names = ", ".join(branch.name for branch in self.step.branches)
        raise CostError(f"there is no site {site}; the sites are {names or 'none'}")

    def stored_bytes(self) -> dict[str, Any]:
        """Bytes that each history gets from one run, of those that the graph writes."""
        found: dict[str, Any] = {}
        for port, node in zip(self.step.outputs, self.step.results(), strict=True):
            if isinstance(port, CacheWrite):
                found[port.site] = found.get(port.site, 0) + self._bytes(node)
        return {name: sympy.expand(size) for name, size in found.items()}

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return self.step.nodes()

    def _bytes(self, node: fx.Node) -> Any:
        if node.name not in self._sizes:
            pairs = zip(_tensors(node), self.shapes[node.name], strict=True)
            self._sizes[node.name] = sympy.Add(*(sympy.Mul(*s) * t.element_size() for t, s in pairs))
        return self._sizes[node.name]

    def _by_branch(self, costs: Mapping[str, Any]) -> dict[str, Any]:
        members = branch_members(self.step)
        shared = owners(members)
        return {
            name: sympy.expand(sympy.Add(*(costs[item] / shared[item] for item in inside)))
            for name, inside in members.items()
        }


class _Unsolved(Exception):
    """A reason why numbers have no expression; the caller knows which node they are of."""


@dataclass
class _Solver:
    """Finds the expression behind one number a capture."""

    sizes: Sequence[Mapping[str, int]]
    known: dict[tuple[Fraction, ...], Any] = field(default_factory=dict)

    @cached_property
    def single(self) -> dict[str, int]:
        """Which capture differs from the base in each symbol alone."""
        base, found = self.sizes[0], dict[str, int]()
        for index, sizes in enumerate(self.sizes):
            if sizes.keys() != base.keys():
                raise CostError(f"the captures have sizes for {sorted(base)} and for {sorted(sizes)}")
            changed = [name for name in base if sizes[name] != base[name]]
            if len(changed) == 1:
                found.setdefault(changed[0], index)
        if missing := base.keys() - found.keys():
            raise CostError(f"no capture changes {', '.join(sorted(missing))} alone; give one, or fix it")
        return found

    def __call__(self, numbers: Sequence[Fraction | int]) -> Any:
        values = tuple(map(Fraction, numbers))
        if values not in self.known:
            self.known[values] = self._solved(values)
        return self.known[values]

    def _solved(self, values: tuple[Fraction, ...]) -> Any:
        power = self._power(values)
        rest = [v / sizes.get(BATCH, 1) ** power for v, sizes in zip(values, self.sizes, strict=True)]
        slopes = self._slopes(rest)
        fitting = {
            form.expression()
            for groups in _partitions(tuple(slopes))
            if (form := self._form(groups, slopes, rest[0])) and form.fits(self.sizes, rest)
        }
        if len(fitting) == 1:
            return fitting.pop() * symbol(BATCH) ** power
        names = " and ".join(slopes)
        if fitting:
            raise _Unsolved(f"{names} may be added or multiplied; give a capture in which they all change")
        at = ", ".join(f"{v} at {listed(s)}" for v, s in zip(values, self.sizes, strict=True))
        raise _Unsolved(f"a dimension is {at}: no sum of products of {names or 'the sizes'}")

    def _power(self, values: Sequence[Fraction]) -> int:
        if BATCH not in self.single:
            return 0
        index = self.single[BATCH]
        ratio = Fraction(self.sizes[index][BATCH], self.sizes[0][BATCH])
        for power in range(3):
            if values[index] == values[0] * ratio**power:
                return power
        raise _Unsolved(
            f"a dimension is {values[0]} at {listed(self.sizes[0])} and {values[index]} at "
            f"{listed(self.sizes[index])}: no power of the batch times something without it"
        )

    def _slopes(self, rest: Sequence[Fraction]) -> dict[str, Fraction]:
        """What one more of each symbol adds, of those that matter."""
        found = {}
        for name, index in self.single.items():
            if name != BATCH and rest[index] != rest[0]:
                found[name] = (rest[index] - rest[0]) / (self.sizes[index][name] - self.sizes[0][name])
        return found

    def _form(
        self, groups: Sequence[tuple[str, ...]], slopes: Mapping[str, Fraction], whole: Fraction
    ) -> "_Form | None":
        """The expression in which each group is a product; None where the slopes speak against it."""
        terms = []
        for group in groups:
            parts = {slopes[name] * self.sizes[0][name] for name in group}
            if len(parts) > 1:
                return None
            part = parts.pop()
            whole -= part
            terms.append((part / math.prod(self.sizes[0][name] for name in group), group))
        return _Form(whole, tuple(terms))


@dataclass(frozen=True)
class _Form:
    """`constant` and the sum of `terms`: a factor and the symbols it multiplies."""

    constant: Fraction
    terms: tuple[tuple[Fraction, tuple[str, ...]], ...]

    def fits(self, sizes: Sequence[Mapping[str, int]], values: Sequence[Fraction]) -> bool:
        return all(self._at(s) == v for s, v in zip(sizes, values, strict=True))

    def _at(self, sizes: Mapping[str, int]) -> Fraction:
        return self.constant + sum(a * math.prod(sizes[name] for name in names) for a, names in self.terms)

    def expression(self) -> Any:
        products = (_rational(a) * sympy.Mul(*map(symbol, names)) for a, names in self.terms)
        return sympy.Add(_rational(self.constant), *products)


def _rational(value: Fraction) -> Any:
    return sympy.Rational(value.numerator, value.denominator)


def _partitions(names: tuple[str, ...]) -> Iterator[list[tuple[str, ...]]]:
    """Every way to put the names into groups."""
    if not names:
        yield []
        return
    first, *others = names
    for groups in _partitions(tuple(others)):
        yield [(first,), *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], (first, *group), *groups[i + 1 :]]


def listed(sizes: Mapping[str, int]) -> str:
    """Sizes as text, such as `batch=2 tokens=16`."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    leaves = tree_leaves(node.meta.get("val"))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _shapes(twins: Sequence[fx.Node], solver: _Solver) -> tuple[Shape, ...]:
    """The dimensions of one node's tensors, given the node of every capture."""
    values = [[tuple(tensor.shape) for tensor in _tensors(node)] for node in twins]
    if any([len(shape) for shape in shapes] != [len(shape) for shape in values[0]] for shapes in values):
        raise _Unsolved("its tensors have other numbers of dimensions at other sizes")
    if not all(isinstance(size, int) for shapes in values for shape in shapes for size in shape):
        raise _Unsolved("its shape depends on data, not on sizes alone")
    found = []
    for shapes in zip(*values, strict=True):
        found.append(tuple(solver(numbers) for numbers in zip(*shapes, strict=True)))
    return tuple(found)


def _flops(twins: Sequence[fx.Node], shapes: tuple[Shape, ...], solver: _Solver) -> Any:
    """FLOPs of one node: those behind each element of the result are solved like a dimension."""
    counts = list(map(cost.flops, twins))
    if not any(counts):
        return sympy.S.Zero
    elements = [_tensors(node)[0].numel() for node in twins]
    each = solver([Fraction(c, e) if e else Fraction(0) for c, e in zip(counts, elements, strict=True)])
    return each * sympy.Mul(*shapes[0])


def _paired(base: StepGraph, capture: Sized) -> dict[fx.Node, fx.Node]:
    """Which node of another capture stands for each node of the base.

    What depends on inputs has to be the same operations in the same order. What depends on the weights alone
    is paired from its readers backwards as far as it agrees: a table may be a buffer at one size only.
    """
    ours, theirs = _live(base), _live(capture.step)
    where = f"at {listed(capture.sizes)} the model runs other operations"
    for one, other in zip(ours, theirs, strict=False):
        if not _is_same(one, other):
            raise CostError(
                f"{_where(base, one)}: {where}: {other.target} ({other.name}) instead; "
                "choose sizes at which it runs the same, or fix that size"
            )
    if len(ours) != len(theirs):
        raise CostError(
            f"{where}: {len(theirs)} that depend on its inputs instead of {len(ours)}; "
            "choose sizes at which it runs the same, or fix that size"
        )
    ports = {port: node for port, node in capture.step.ports() if not isinstance(port, Hoisted)}
    pairs = {node: ports[port] for port, node in base.ports() if port in ports}
    todo = list(zip(ours, theirs, strict=True))
    pairs |= todo
    while todo:
        one, other = todo.pop()
        for mine, twin in zip(one.all_input_nodes, other.all_input_nodes, strict=True):
            if mine not in pairs:
                pairs[mine] = twin
                if _is_same(mine, twin):
                    todo.append((mine, twin))
    return pairs


def _is_same(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are the same operation; weights and hoisted values may have other names."""
    if one.op != other.op or len(one.all_input_nodes) != len(other.all_input_nodes):
        return False
    return one.op != "call_function" or one.target is other.target


def _live(step: StepGraph) -> list[fx.Node]:
    """Operations that depend on what a step is given; hoisted values may stand for tables of the weights."""
    found = {node for port, node in step.ports() if not isinstance(port, Hoisted)}
    order = []
    for node in step.graph.nodes:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
            order.append(node)
    return order


def _where(step: StepGraph, node: fx.Node) -> str:
    """A node and its site; a phase's graph may have lost some of its branches."""
    nodes = step.nodes()
    kept = tuple(b for b in step.branches if {b.value, b.merge, b.stream} <= nodes.keys())
    members = branch_members(replace(step, branches=kept))
    sites = [name for name, inside in members.items() if node.name in inside]
    place = f"site {', '.join(sites)}" if sites else "outside the sites"
    return f"{place}, node {node.name} ({node.target})"
