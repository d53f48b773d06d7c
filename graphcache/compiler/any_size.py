"""Code for inputs of any size: made of graphs that are alike but for their sizes."""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphcache.analysis.size_expressions import Column, Expression, Expressions, expressions
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.sizes import layout_with, with_sizes
from graphcache.libraries.torch_private import FakeTensorMode

if TYPE_CHECKING:  # sympy takes half a second to import
    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

log = logging.getLogger("graphcache")

_MOST = 8
"""Codes that one form of graphs may have; another size is compiled as a fixed one."""

Sizes = tuple[int, ...]
Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""Compiles a graph for inputs like these, some of whose sizes are symbols."""


@dataclass(frozen=True)
class AnySize:
    """Code that is given its sizes behind its tensors, and what these must be for it.

    Attributes:
        code: of a graph of this form.
        columns: of each size in the graph, its values in the examples.
        found: how they are computed.
        free: the symbols that are given.
        guards: what compiling has taken for granted of them.
    """

    code: Callable[..., Sequence[torch.Tensor]]
    columns: tuple[Column, ...]
    found: Expressions
    free: "tuple[sympy.Symbol, ...]"
    guards: tuple[Any, ...]

    def numbers(self, sizes: Sizes) -> tuple[int, ...] | None:
        """What the code is given for a graph of these sizes; None where it does not serve that."""
        seen = dict(zip(self.columns, sizes, strict=True))
        units, found = self.found
        values = [seen[unit.column] for unit in units]
        expected = {column: found[column].of(values) if column in found else column[0] for column in seen}
        if any(expected[column] != size for column, size in zip(self.columns, sizes, strict=True)):
            return None
        given = tuple(value for value, unit in zip(values, units, strict=True) if unit.made is None)
        if self.found.values(given) != values:
            return None
        import sympy

        symbols = dict(zip(self.free, map(sympy.Integer, given), strict=True))
        return given if all(guard.xreplace(symbols) == sympy.true for guard in self.guards) else None


@dataclass
class Family:
    """Graphs of one form, by their sizes and for which call they were made; and code that serves many.

    `fails`: whether a compiler could do nothing with symbols, or nothing that is right for its own example.
    """

    members: dict[Sizes, Hashable] = field(default_factory=dict)
    codes: list[AnySize] = field(default_factory=list)
    fails: bool = False

    def code(
        self,
        sizes: Sizes,
        signature: Hashable,
        module: fx.GraphModule,
        fed: Sequence[torch.Tensor],
        compile_: Compile,
    ) -> Callable[..., Sequence[torch.Tensor]] | None:
        """Code for one of the graphs, made if need be; None while all are of one call, or where it fails.

        Args:
            sizes: of the graph.
            signature: of the call that it was made for.
            module: the graph.
            fed: tensors laid out as its inputs are.
            compile_: compiles a graph.
        """
        for code in reversed(self.codes):
            numbers = code.numbers(sizes)
            if numbers is not None:
                return _bound(code.code, numbers)
        if self.fails or len(self.codes) >= _MOST:
            return None
        self.note(sizes, signature)
        if len(set(self.members.values())) == 1:
            return None
        # the latest comes last: what the compiler asks of a symbol is answered as for this one
        rows = [*(other for other in self.members if other != sizes), sizes]
        try:
            made = _made(tuple(zip(*rows, strict=True)), module, fed, compile_)
            numbers = made.numbers(sizes)
            if numbers is None:
                raise GraphCacheError(f"what was compiled is not for {sizes}, which it was compiled for")
        except Exception as error:  # whatever a compiler fails with, a fixed size does without
            log.warning("a phase is compiled anew for each size, since with symbols for sizes: %s", error)
            self.fails = True
            return None
        self.codes.append(made)
        return _bound(made.code, numbers)

    def note(self, sizes: Sizes, signature: Hashable) -> None:
        """Take up a graph as an example."""
        self.members[sizes] = signature


def _bound(
    code: Callable[..., Sequence[torch.Tensor]], numbers: tuple[int, ...]
) -> Callable[..., Sequence[torch.Tensor]]:
    return lambda *tensors: code(*tensors, *numbers)


def _made(
    columns: tuple[Column, ...], module: fx.GraphModule, fed: Sequence[torch.Tensor], compile_: Compile
) -> AnySize:
    """Code for graphs of these sizes: those of the module are the latest ones."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    found = expressions(columns)
    environment = ShapeEnv(duck_shape=False)
    hints = [unit.column[-1] for unit in found.units if unit.made is None]
    free = [_symbol(environment, f"size_{place}", hint) for place, hint in enumerate(hints)]
    symbols = tuple(size.node.expr for size in free)
    general, examples = _general(module, fed, columns, found, free, FakeTensorMode(shape_env=environment))
    code = compile_(general, examples)
    guards = tuple(guard.expr for guard in environment.guards)
    return AnySize(code, columns, found, symbols, guards)


def _symbol(environment: "ShapeEnv", name: str, hint: int) -> torch.SymInt:
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    from graphcache.libraries.torch_compilers_private import ConstantSource

    source = ConstantSource(name)
    symbol = environment.create_symbol(hint, source, DimDynamic.DYNAMIC)
    size: Any = environment.create_symintnode(symbol, hint=hint, source=source)
    return size  # type: ignore[no-any-return]


def _general(
    module: fx.GraphModule,
    fed: Sequence[torch.Tensor],
    columns: Sequence[Column],
    found: Expressions,
    free: Sequence[torch.SymInt],
    mode: FakeTensorMode,
) -> tuple[fx.GraphModule, list[Any]]:
    """A graph with symbols for sizes, which are further inputs of it, and examples of its inputs."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    position = iter(columns)
    examples: list[Any] = []
    units = found.values(free)

    def symbol(size: int) -> Any:
        made = found.found.get(next(position))
        return size if made is None else made.of(units)

    for node, tensor in zip(module.graph.find_nodes(op="placeholder"), fed, strict=True):
        env[node] = graph.placeholder(node.name)
        shape, strides = layout_with(tensor, symbol)
        with mode:
            made = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
        examples.append(made)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    given = [fx.Proxy(graph.placeholder(f"size_{place}"), tracer) for place in range(len(free))]
    units = found.values(given)
    known: dict[Expression, fx.Node] = {}

    def node_of(size: int) -> Any:
        made = found.found.get(next(position))
        if made is None:
            return size
        if made not in known:
            known[made] = made.of(units).node
        return known[made]

    for node in module.graph.nodes:
        if node.op != "placeholder":
            arguments = with_sizes(node, node_of)
            env[node] = graph.create_node(node.op, node.target, name=node.name)
            args, kwargs = fx.map_arg(arguments, lambda other: env.get(other, other))
            env[node].args, env[node].kwargs = args, dict(kwargs)
    graph.lint()
    # what standalone_compile finds the symbols by
    graph.output_node().all_input_nodes[0].meta["example_value"] = examples[0]
    return fx.GraphModule(module, graph), [*examples, *free]
