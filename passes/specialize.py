"""One phase of a plan, written into the graph: sites become inputs and further outputs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.ranges import Bypass, RangeCut, cut_range
from graphcache.ir.graph import (
    CacheRead,
    CacheWrite,
    Coefficients,
    InPort,
    OutPort,
    Output,
    StepGraph,
    fake_mode,
    value_of,
)
from graphcache.ir.schedule import Action, Phase
from graphcache.passes.prune import Prune

aten = ops.aten


@dataclass(frozen=True)
class Specialize:
    """Obtain every site as the phase says, and remove what is then needed no more.

    `ranges` are the (name, first block, last block) of the range sites that the phase speaks of.
    """

    phase: Phase
    ranges: tuple[tuple[str, int, int], ...] = ()

    def __call__(self, step: StepGraph) -> StepGraph:
        cuts = {name: cut_range(step, name, first, last) for name, first, last in self.ranges}
        rewriter = _Rewriter(step)
        actions = [(name, action) for name, action in self.phase.actions if action.kind != "hold"]
        parts = {name: rewriter.parts(name, cuts.get(name)) for name, _ in actions if name != "output"}
        # innermost first: what lies around a site takes its value as the site hands it on
        for name, action in reversed(actions):
            places = rewriter.output_parts() if name == "output" else parts[name]
            for number, part in enumerate(places):
                rewriter.apply(name, number, action, part)
        return Prune()(rewriter.finished())


@dataclass(frozen=True)
class _Part:
    """One tensor of a site.

    `raw` is what the step computes for it; `substitute` puts another value in its place. `fresh` values
    are copied when they are stored or reused: views would pin their base, results may be changed in place.
    """

    raw: fx.Node
    substitute: Callable[[fx.Node, set[fx.Node]], None]
    fresh: bool
    result: bool = False


@dataclass
class _Rewriter:
    """A copy of the step under change; ports are added as sites are turned into them."""

    step: StepGraph
    graph: fx.Graph = field(init=False)
    nodes: dict[str, fx.Node] = field(init=False)
    inputs: list[InPort] = field(init=False)
    outputs: list[OutPort] = field(init=False)
    results: list[fx.Node] = field(init=False)
    loaded: dict[InPort, fx.Node] = field(default_factory=dict)
    streams: dict[fx.Node, fx.Node] = field(default_factory=dict)
    deltas: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph, env = self.step.copy()
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.inputs = list(self.step.inputs)
        self.outputs = list(self.step.outputs)
        self.results = [env[node] for node in self.step.results()]
        self.first = next(node for node in self.graph.nodes if node.op != "placeholder")

    def parts(self, name: str, cut: RangeCut | None) -> list[_Part]:
        if cut is not None:
            bypass = Bypass(self.graph, cut)
            return [self._range_part(self.nodes[merge], bypass) for merge in cut.leaving]
        branch = next(b for b in self.step.branches if b.name == name)
        value = self.nodes[branch.value]
        fresh = ops.is_view(value) or ops.is_slice(value)
        return [_Part(value, lambda new, keep: self._replace(value, new, keep), fresh)]

    def output_parts(self) -> list[_Part]:
        return [self._output_part(i) for i, port in enumerate(self.outputs) if isinstance(port, Output)]

    def _output_part(self, index: int) -> _Part:
        def substitute(new: fx.Node, keep: set[fx.Node]) -> None:
            self.results[index] = new

        return _Part(self.results[index], substitute, fresh=True, result=True)

    def _range_part(self, merge: fx.Node, bypass: Bypass) -> _Part:
        """The range's change of one stream: x_out - x_in.

        Several ranges may end at one residual add; they come here outermost first. `streams` is the add's
        value after the inner ones, whose deltas keep reading what they were made of.
        """
        before = bypass(merge)
        delta = self._emit(merge, aten.sub.Tensor, merge, before)
        deltas = self.deltas.setdefault(merge, [])
        deltas.append(delta)

        def substitute(new: fx.Node, keep: set[fx.Node]) -> None:
            after = new if new.op == "call_function" else delta
            whole = self._emit(after, aten.add.Tensor, before, new)
            unchanged = {whole, *deltas[deltas.index(delta) :]}
            self._replace(self.streams.get(merge, merge), whole, unchanged)
            self.streams[merge] = whole

        return _Part(delta, substitute, fresh=False)

    def apply(self, name: str, number: int, action: Action, part: _Part) -> None:
        raw, keep = part.raw, set[fx.Node]()
        if action.stores:
            kept = self._copy(raw, raw) if part.fresh else raw
            keep.add(kept)
            self.outputs.append(CacheWrite(name, number))
            self.results.append(kept)
        if action.kind == "compute":
            return
        entries = [self._load(CacheRead(name, number, i), part) for i in range(action.reads)]
        if action.kind == "correct":
            entries.insert(0, raw)
        if action.group >= 0:
            new = self._combine(raw, entries, action.group, keep)
        else:
            new = self._copy(raw, entries[0]) if part.result else entries[0]
        part.substitute(new, keep)

    def _replace(self, old: fx.Node, new: fx.Node, keep: set[fx.Node]) -> None:
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in keep)
        for i, port in enumerate(self.outputs):
            if isinstance(port, Output) and self.results[i] is old:
                self.results[i] = new

    def _load(self, port: InPort, part: _Part) -> fx.Node:
        value = value_of(part.raw)
        with fake_mode(value):
            layout = torch.contiguous_format if part.fresh else torch.preserve_format
            return self._placeholder(port, torch.empty_like(value, memory_format=layout))

    def _placeholder(self, port: InPort, value: torch.Tensor) -> fx.Node:
        if port not in self.loaded:
            with self.graph.inserting_before(self.first):
                node = self.graph.placeholder(_name(port))
            node.meta["val"] = value
            self.inputs.append(port)
            self.loaded[port] = node
        return self.loaded[port]

    def _combine(self, raw: fx.Node, entries: Sequence[fx.Node], group: int, made: set[fx.Node]) -> fx.Node:
        """The weighted sum of the entries, newest first, in fp32 at least."""
        dtype, device = value_of(raw).dtype, value_of(raw).device
        wide = torch.promote_types(dtype, torch.float32)
        with fake_mode(value_of(raw)):
            weights = self._placeholder(
                Coefficients(group), torch.empty(len(entries), dtype=wide, device=device)
            )
        last = raw

        def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            nonlocal last
            last = self._emit(last, target, *args, **kwargs)
            made.add(last)
            return last

        total: fx.Node | None = None
        for i, entry in enumerate(entries):
            weight = emit(aten.select.int, weights, 0, i)
            term = emit(aten.mul.Tensor, entry if dtype == wide else _widen(emit, entry, wide), weight)
            total = term if total is None else emit(aten.add.Tensor, total, term)
        return last if dtype == wide else _widen(emit, last, dtype)

    def _copy(self, after: fx.Node, node: fx.Node) -> fx.Node:
        return self._emit(after, aten.clone.default, node, memory_format=torch.contiguous_format)

    def _emit(self, after: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_after(after):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = _fake(target, args, kwargs)
        return node

    def finished(self) -> StepGraph:
        """The graph, with results of their own: a caller may change them in place."""
        bases = [ops.behind(node, ops.VIEWS | ops.SLICES) for node in self.results]
        kept = {base for port, base in zip(self.outputs, bases, strict=True) if isinstance(port, CacheWrite)}
        for i, (port, base) in enumerate(zip(self.outputs, bases, strict=True)):
            if isinstance(port, Output) and (base in kept or base.op in ("placeholder", "get_attr")):
                self.results[i] = self._copy(max((self.results[i], self.first)), self.results[i])
        self.graph.erase_node(self.graph.output_node())
        self.graph.output(tuple(self.results))
        return self.step.rebuilt(self.graph, inputs=tuple(self.inputs), outputs=tuple(self.outputs))


def _widen(emit: Callable[..., fx.Node], node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return emit(aten._to_copy.default, node, dtype=dtype)


def _fake(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in args]
    with fake_mode(next(v for v in values if isinstance(v, torch.Tensor))):
        result: torch.Tensor = target(*values, **kwargs)
    return result


def _name(port: InPort) -> str:
    if isinstance(port, CacheRead):
        site = "".join(c if c.isalnum() else "_" for c in port.site)
        return f"cache_{site}_{port.part}_{port.entry}"
    return f"coefficients_{port.group}" if isinstance(port, Coefficients) else str(port).replace(" ", "_")


def entry_values(
    step: StepGraph, sites: Iterable[str], ranges: Sequence[tuple[str, int, int]]
) -> dict[str, list[torch.Tensor]]:
    """Fake tensors like one history entry of each site, one per part."""
    nodes = step.nodes()
    values = {branch.name: [branch.value] for branch in step.branches}
    values |= {name: list(cut_range(step, name, first, last).leaving) for name, first, last in ranges}
    values["output"] = [node.name for node in step.results()]
    return {site: [value_of(nodes[name]) for name in values[site]] for site in sites}
