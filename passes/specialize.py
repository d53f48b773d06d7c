"""One phase of a plan, written into the graph: sites become inputs and further outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.ranges import Bypass, RangeCut, cut_range
from graphcache.analysis.tokens import TokenCut, token_cuts
from graphcache.ir.graph import CacheRead, CacheWrite, Output, StepGraph, fake_mode, value_of
from graphcache.ir.history import GUIDANCE, OUTPUT, PREDICTION, History
from graphcache.ir.schedule import Action, Memory, Phase
from graphcache.passes.pack import Packed
from graphcache.passes.partial import Partial, remembered
from graphcache.passes.prune import pruned
from graphcache.passes.rewrite import Rewriter
from graphcache.passes.scores import Scores, measured

aten = ops.aten


@dataclass(frozen=True)
class _Rows:
    """Where the rows of a part come from and go to: all of them, or one half of the batch."""

    history: History
    action: Action
    half: int | None = None


@dataclass(frozen=True)
class Specialize:
    """Obtain every site as the phase says, and remove what is then needed no more.

    `ranges` are the (name, first block, last block) of the range sites that the phase speaks of.
    `conditional` is the half of a doubled batch, "first" or "last", that has histories of its own.
    """

    phase: Phase
    ranges: tuple[tuple[str, int, int], ...] = ()
    conditional: str | None = None
    memories: tuple[Memory, ...] = ()

    def __call__(self, step: StepGraph) -> StepGraph:
        cuts = {name: cut_range(step, name, first, last) for name, first, last in self.ranges}
        actions = dict(self.phase.actions)
        budgeted = {history.site for history, action in actions.items() if action.budget is not None}
        met = [memory for memory in self.memories if actions[memory.history].kind == "tokens"]
        budgeted |= {site for memory in met for site in memory.sites}
        rewriter = _Sites(step, is_half=self.phase.half)
        rewriter.cuts = token_cuts(rewriter.flow, budgeted)
        for memory in self.memories:
            kept = remembered(rewriter, memory, actions, rewriter.cuts)
            if kept is not None:
                rewriter.memory[memory.node] = kept
        sites = [history.site for history in actions if self._is_rewritten(history, actions)]
        parts = {name: rewriter.parts(name, cuts.get(name)) for name in sites if name != OUTPUT}
        # innermost first: what lies around a site takes its value as the site hands it on
        for name in reversed(sites):
            places = rewriter.output_parts() if name == OUTPUT else parts[name]
            for number, part in enumerate(places):
                rewriter.apply(self._rows(History(name), actions), number, part)
        return pruned(rewriter.finished())

    def _is_rewritten(self, history: History, actions: Mapping[History, Action]) -> bool:
        is_site = history.is_value and history.site not in (GUIDANCE, PREDICTION)
        return is_site and actions[history].kind != "hold"

    def _rows(self, history: History, actions: Mapping[History, Action]) -> list[_Rows]:
        """Of the whole batch, or of its halves in their order."""
        other = history.other_half
        if other not in actions or self.phase.half:
            return [_Rows(history, actions[history])]
        order = (history, other) if self.conditional == "first" else (other, history)
        return [_Rows(each, actions[each], half) for half, each in enumerate(order)]


@dataclass(frozen=True)
class _Part:
    """One tensor of a site.

    `raw` is what the step computes for it; `substitute` puts another value in its place, which may be what
    corrects it. `fresh` values are copied when they are stored or reused: views would pin their base, results
    may be changed in place.
    """

    raw: fx.Node
    substitute: Callable[[fx.Node, set[fx.Node], bool], None]
    fresh: bool
    result: bool = False


@dataclass
class _Sites(Rewriter):
    """A copy of the step whose sites are turned into ports."""

    is_half: bool = False
    cuts: Mapping[str, TokenCut] = field(default_factory=dict)
    memory: dict[str, fx.Node] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)

    @cached_property
    def flow(self) -> Dataflow:
        return Dataflow(self.step)

    streams: dict[fx.Node, fx.Node] = field(default_factory=dict)
    deltas: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def parts(self, name: str, cut: RangeCut | None) -> list[_Part]:
        if cut is not None:
            bypass = Bypass(self.graph, cut)
            return [self._range_part(self.nodes[merge], bypass) for merge in cut.leaving]
        branch = next(b for b in self.step.branches if b.name == name)
        value = self.nodes[branch.value]
        fresh = ops.is_view(value) or ops.is_slice(value)
        return [_Part(value, lambda new, keep, _: self._replace(value, new, keep), fresh)]

    def output_parts(self) -> list[_Part]:
        return [self._output_part(i) for i, port in enumerate(self.outputs) if isinstance(port, Output)]

    def _output_part(self, index: int) -> _Part:
        def substitute(new: fx.Node, keep: set[fx.Node], corrects: bool) -> None:
            self.results[index] = new

        return _Part(self.results[index], substitute, fresh=True, result=True)

    def _range_part(self, merge: fx.Node, bypass: Bypass) -> _Part:
        """The range's change of one stream: x_out - x_in.

        Several ranges may end at one residual add; they come here outermost first. `streams` is the add's
        value after the inner ones, whose deltas keep reading what they were made of. A correction is added to
        that value, so that one by nothing changes no bit.
        """
        before = bypass(merge)
        delta = self.emit(merge, aten.sub.Tensor, merge, before)
        deltas = self.deltas.setdefault(merge, [])
        deltas.append(delta)

        def substitute(new: fx.Node, keep: set[fx.Node], corrects: bool) -> None:
            after = new if new.op == "call_function" else delta
            stream = self.streams.get(merge, merge)
            if corrects:
                change = self.emit(after, aten.sub.Tensor, new, delta)
                whole = self.emit(change, aten.add.Tensor, stream, change)
            else:
                # a range that ends where this one begins may have been substituted already
                whole = self.emit(after, aten.add.Tensor, self.streams.get(before, before), new)
            self._replace(stream, whole, {whole, *deltas[deltas.index(delta) :]})
            self.streams[merge] = whole

        return _Part(delta, substitute, fresh=False)

    def apply(self, sources: Sequence[_Rows], number: int, part: _Part) -> None:
        """Obtain one part of a site from its history, or from those of a doubled batch's halves."""
        raw, keep, kinds = part.raw, set[fx.Node](), {source.action.kind for source in sources}
        if "tokens" in kinds:
            part.substitute(self._partial(sources, part), keep, False)
            return
        corrects = kinds <= {"compute", "correct"}
        if len(sources) == 1:
            # both graphs of a doubled batch hand on contiguous rows
            part = replace(part, fresh=part.fresh or (self.is_half and not value_of(raw).is_contiguous()))
            new = self._obtained(sources[0], number, part, raw, keep)
            if new is not None:
                part.substitute(new, keep, corrects)
            return
        halves = []
        for half, source in enumerate(sources):
            if source.action.kind == "compute" and not source.action.stores:
                continue
            rows = self.after(raw).rows(raw, half)
            keep.add(rows)
            taken = self._obtained(source, number, replace(part, fresh=True), rows, keep)
            if taken is not None:
                halves.append(taken)
        if halves:
            last = max([raw, *(half for half in halves if half.op != "placeholder")])
            part.substitute(self.emit(last, aten.cat.default, halves), keep, corrects)

    def _obtained(
        self, source: _Rows, number: int, part: _Part, raw: fx.Node, keep: set[fx.Node]
    ) -> fx.Node | None:
        """What stands for `raw`, None when it computes; hands out what is stored."""
        action = source.action
        if action.packed:
            return self._packed(source, number, raw, keep)
        if action.measure is not None:
            self.write(CacheWrite(source.history.scores, 0), self._measured(source, raw))
        if action.stores:
            kept = self.after(raw).copied(raw) if part.fresh else raw
            keep.add(kept)
            self.write(CacheWrite(source.history, number), kept)
        if action.kind == "compute":
            return None
        ports = [CacheRead(source.history, number, i, action.optional) for i in range(action.reads)]
        entries = [self._load(port, raw, part) for port in ports]
        if action.kind == "correct":
            entries.insert(0, raw)
        if action.patched:
            entries = [self._load(CacheRead(source.history.patched, number, 0), raw, part)]
        if action.group >= 0:
            return self.combine(raw, entries, action.group, keep)
        return self.after(raw).copied(entries[0]) if part.result else entries[0]

    def _measured(self, source: _Rows, raw: fx.Node) -> fx.Node:
        measure, site = source.action.measure, source.history.site
        assert measure is not None
        return measured(self, self.flow, self.scores, site, measure, raw, source.half)

    def _partial(self, sources: Sequence[_Rows], part: _Part) -> fx.Node:
        """The cached value with the chosen tokens computed anew."""
        action, histories = sources[0].action, [source.history for source in sources]
        assert all(source.action == action for source in sources)
        chain = self.after(part.raw)
        partial = Partial(self, self.cuts[histories[0].site], self.memory, chain)
        value, entries = value_of(part.raw), []
        for history in histories:
            read = history.patched if action.patched else history
            port = CacheRead(read, 0, 0, changed=not action.patches)
            if len(histories) == 1:
                entry = self._load(port, part.raw, part)
            else:
                entry = self.input(port, value, shape=(value.shape[0] // 2, *value.shape[1:]))
            entries.append(chain.copied(entry) if action.patches else entry)
        return partial.value(histories, action, entries)

    def _packed(self, source: _Rows, number: int, raw: fx.Node, keep: set[fx.Node]) -> fx.Node | None:
        """The same from a value in bfloat16 and its difference to the one before in 8 bits."""
        action, cache = source.action, Packed(self, raw, keep)
        ports = [CacheRead(source.history, 3 * number + part, 0) for part in range(3)]
        if action.stores:
            for part, node in enumerate(cache.pack(ports[0])):
                self.write(CacheWrite(source.history, 3 * number + part), node)
        if action.kind == "compute":
            return None
        return cache.unpack(ports, action.group)

    def _replace(self, old: fx.Node, new: fx.Node, keep: set[fx.Node]) -> None:
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in keep)
        for i, port in enumerate(self.outputs):
            if isinstance(port, Output) and self.results[i] is old:
                self.results[i] = new

    def _load(self, port: CacheRead, raw: fx.Node, part: _Part) -> fx.Node:
        value = value_of(raw)
        with fake_mode(value):
            layout = torch.contiguous_format if part.fresh else torch.preserve_format
            return self.placeholder(port, torch.empty_like(value, memory_format=layout))
