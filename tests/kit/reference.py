"""The executable definition of a plan: the untouched graph run node by node, sites obtained as the plan says.

It keeps every value for ever and knows no liveness, phases or specialised graphs, so that the library's
answers can be compared with it bit for bit.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import graphcache
from graphcache.analysis.bases import coefficients
from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.tokens import TokenCut, memories, token_cuts
from graphcache.compiler.captured import Captured
from graphcache.compiler.program import Program
from graphcache.ir.call import Binder, CallSpec
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import StepGraph, value_of
from graphcache.ir.history import History
from graphcache.ir.letter import Letter
from graphcache.ir.plan import Plan, Row
from graphcache.ir.resolve import resolve
from graphcache.ir.roles import Names
from graphcache.ir.schedule import Selection
from graphcache.ir.state import Choice
from graphcache.runtime.selection import SiteTokens
from graphcache.tracing.capture import forward_parameters
from inside import engine_of
from reference_selection import chosen
from seeding import own_numbers
from zoo import CASES, Case

Computed = tuple[int, tuple[Tensor, ...]]
"""A step and the raw value that a site had there, one tensor per part."""


@dataclass(frozen=True)
class Range:
    """Consecutive blocks: their residual adds with the streams they add to, and those read afterwards."""

    first: int
    last: int
    streams: Mapping[fx.Node, fx.Node]
    leaving: tuple[fx.Node, ...]

    @staticmethod
    def of(step: StepGraph, first: int, last: int) -> "Range":
        nodes = {node.name: node for node in step.graph.nodes}
        inside = [branch for branch in step.branches if first <= branch.block <= last]
        streams = {nodes[branch.merge]: nodes[branch.stream] for branch in inside}
        leaving = tuple(
            node for node in step.graph.nodes if node in streams and _is_read_after(node, streams)
        )
        return Range(first, last, streams, leaving)


def _is_read_after(merge: fx.Node, streams: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether a path leads from the add to the result through no other add of the range."""
    todo, seen = list(merge.users), set[fx.Node]()
    while todo:
        node = todo.pop()
        if node.op == "output":
            return True
        if node not in seen and node not in streams:
            seen.add(node)
            todo.extend(node.users)
    return False


@dataclass
class Site:
    """A row met with the site it speaks of, and all that the site ever computed, newest first."""

    name: str
    row: Row
    blocks: tuple[int, int]
    history: list[Computed] = field(default_factory=list)
    fresh: list[Tensor] = field(default_factory=list)
    symbol: str = "#"
    patched: Tensor | None = None
    chosen: dict[int, Choice] = field(default_factory=dict)


class Reference:
    """Runs a captured, tagged and otherwise untouched step under a plan, one call a step."""

    def __init__(self, captured: Captured, plan: Plan, start: int = 0) -> None:
        self.captured, self.plan, self.start, self.now = captured, plan, start, start
        self.letters = {letter.symbol: letter for letter in plan.letters}
        step = captured.step
        rows = resolve(plan, step.branches, step.blocks)
        whole = (0, step.blocks - 1)
        self.output = Site("output", rows.output, whole) if rows.output else None
        largest_first = sorted(rows.ranges, key=lambda item: item[1] - item[2])
        self.ranges = [Site(f"range({a}..{b})", row, (a, b)) for row, a, b in largest_first]
        self.cuts = {site.name: Range.of(step, *site.blocks) for site in self.ranges}
        self.branches = {
            branch.value: Site(branch.name, rows.branches[branch.name], (branch.block, branch.block))
            for branch in step.branches
            if branch.name in rows.branches
        }
        budgeted = {
            site.name
            for site in self.branches.values()
            if any(item.is_tokens and item.symbol in site.row.actions for item in plan.letters)
        }
        self.tokens = token_cuts(Dataflow(step), budgeted) if budgeted else {}
        self.memories = {item.node: item for item in memories(step, self.tokens)}
        self.remembered: dict[str, Tensor] = {}

    def goes_on_with(self, captured: Captured) -> None:
        """From now on for the model in another form, of the same sites."""
        self.captured = captured
        self.cuts = {site.name: Range.of(captured.step, *site.blocks) for site in self.ranges}

    def sites(self) -> list[Site]:
        """Outermost first."""
        return [*([self.output] if self.output else []), *self.ranges, *self.branches.values()]

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """One step on flat inputs in signature order, structured like the model's result."""
        self._decide()
        if self.output is not None and self._is_taken(self.output):
            parts = range(self.captured.output.count)
            results = tuple(self._obtained(self.output, part, None) for part in parts)
        else:
            results = _Step(self).run(*tensors)
            if self.output is not None:
                results = tuple(self._obtained(self.output, part, raw) for part, raw in enumerate(results))
        for site in self.sites():
            if site.fresh:
                site.history.insert(0, (self.now, tuple(site.fresh)))
                site.fresh = []
        self.now += 1
        return self.captured.output.build(results)

    def _is_taken(self, site: Site) -> bool:
        """Whether the site comes from its history alone."""
        return site.symbol == "." or (site.symbol in self.letters and self.letters[site.symbol].is_forecast)

    def _decide(self) -> None:
        """The action of every site at this step; inside what is taken from the cache all is held."""
        taken: list[Site] = []
        for site in self.sites():
            around = [outer for outer in taken if _contains(outer.blocks, site.blocks)]
            if around or (self.output in taken and site is not self.output):
                site.symbol = "held"
                continue
            site.symbol = site.row.actions[self.now]
            if site.symbol != "#" and not site.history:
                if self.start == 0:
                    raise PlanError(f"{site.name}, step {self.now}: nothing was computed yet")
                site.symbol = "#"
            letter = self.letters.get(site.symbol)
            known = len(site.history) + bool(letter and letter.is_compute)
            if self.start and len(site.row.listed(self.now) or ()) > known:
                site.symbol = "#"
            if self._is_taken(site):
                if any(_overlap(outer.blocks, site.blocks) for outer in taken):
                    raise PlanError(f"{site.name}, step {self.now}: overlaps with another range taken")
                if site.name.startswith("range") or site is self.output:
                    taken.append(site)

    def obtained(self, node: fx.Node, raw: Any, run: "_Step") -> Any:
        """What readers of `node` see, given what it computed."""
        if node.name in self.memories:
            return self._remembered(node, raw)
        site = self.branches.get(node.name)
        if site is not None:
            raw = self._obtained(site, 0, raw)
        for outer in reversed(self.ranges):
            cut = self.cuts[outer.name]
            if node in cut.leaving and outer.symbol != "held":
                before = run.bypass(cut, cut.streams[node])
                change = raw - before
                used = self._obtained(outer, cut.leaving.index(node), change)
                letter = self.letters.get(outer.symbol)
                if letter is not None and letter.is_compute:
                    raw = raw + (used - change)
                elif used is not change:
                    raw = before + used
        return raw

    def _obtained(self, site: Site, part: int, raw: Any) -> Any:
        letter = self.letters.get(site.symbol)
        if site.symbol == "held":
            return raw
        if site.symbol == "#" or (letter is not None and letter.is_compute):
            site.fresh.append(raw)
            site.patched = None
            if site.name in self.tokens:
                self._choose(site, raw)
        if letter is not None and letter.is_tokens:
            return self._patched(site, letter, raw)
        if site.symbol == "." and site.patched is not None:
            return site.patched.clone()
        if site.symbol == "#":
            return raw
        values = [parts[part] for _, parts in site.history]
        if any(item.is_packed and item.symbol in site.row.actions for item in self.letters.values()):
            weight = -self._weights(site.row, letter, [s for s, _ in site.history])[1] if letter else 0.0
            return unpacked(values, weight)
        if letter is None:
            return values[0]
        steps = [step for step, _ in site.history]
        if letter.is_compute:
            steps, values = [self.now, *steps], [raw, *values]
        return weighted(values, self._weights(site.row, letter, steps))

    def _choose(self, site: Site, raw: Tensor) -> None:
        """The tokens of the steps up to the next one that computes the site."""
        steps, step = [], self.now + 1
        while step < self.plan.steps and (symbol := self._later(site, step)) != "#":
            if symbol in self.letters and self.letters[symbol].is_compute:
                break
            if symbol in self.letters and self.letters[symbol].is_tokens:
                steps.append((step, self.letters[symbol]))
            step += 1
        if steps:
            cut = self.tokens[site.name]
            number = [branch.name for branch in self.captured.step.branches].index(site.name)
            score = raw
            if steps[0][1].option("by") == "norm":
                rows, numbers, _ = numbered(cut)
                squares = torch.zeros(cut.rows, cut.tokens, dtype=torch.float64)
                norms = squares.index_put((rows, numbers), raw.double().cpu() ** 2, accumulate=True).sqrt()
                norms = norms.to(raw.device)
                score = norms / norms.norm(dim=-1, keepdim=True)
            tokens = SiteTokens(cut.rows, cut.tokens, raw.device, self.plan.grid)
            selection = Selection(History(site.name), tuple(steps), step - self.now)
            site.chosen = chosen(selection, tokens, self.now, number, score)

    def _later(self, site: Site, step: int) -> str:
        """The symbol that a site will have: held within what is taken from the cache."""
        outer = [*([self.output] if self.output else []), *self.ranges]
        for other in outer:
            symbol = other.row.actions[step]
            taken = symbol == "." or (symbol in self.letters and self.letters[symbol].is_forecast)
            if taken and (other is self.output or _contains(other.blocks, site.blocks)):
                return "held"
        return site.row.actions[step]

    def _patched(self, site: Site, letter: Letter, raw: Tensor) -> Tensor:
        """The newest value with the chosen tokens' own in it."""
        newest = (site.history[0][1][0] if site.patched is None else site.patched).clone()
        cut, choice = self.tokens[site.name], site.chosen[self.now]
        if letter.option("by") == "cluster":
            values, fresh = (item.view(cut.rows, cut.tokens, -1) for item in (newest, raw.contiguous()))
            share = float(letter.option("blend"))
            for row, clusters in enumerate(choice.clusters):
                spread = fresh[row][choice.places[row]][clusters]
                values[row] = values[row] * (1 - share) + spread * share
        inside = held_by(cut, choice.places)
        newest[inside] = raw[inside]
        site.patched = newest
        return newest.clone()

    def _remembered(self, node: fx.Node, raw: Tensor) -> Tensor:
        """Keys or values: all new where a reader computes, else the rows of the chosen tokens."""
        memory = self.memories[node.name]
        named = {site.name: site for site in self.branches.values()}
        symbols = [named[name].symbol if name in named else "#" for name in memory.readers]
        letters = [self.letters.get(symbol) for symbol in symbols]
        if "#" in symbols or any(letter is not None and letter.is_compute for letter in letters):
            self.remembered[node.name] = raw.clone()
            return raw
        kept = self.remembered.get(node.name)
        cuts = [
            next(item for n, item in self.tokens[name].memory.items() if n.name == node.name)
            for name in memory.sites
        ]
        followed = {other.layout: numbered(other)[2] for cut in cuts for other in cut.beside}
        for inside in (
            inside for layout, inside in followed.items() if layout not in {c.layout for c in cuts}
        ):
            if kept is not None:
                # what no site of the plan updates belongs to this step
                kept[inside.to(raw.device)] = raw[inside.to(raw.device)]
        for name in memory.sites:
            letter = self.letters.get(named[name].symbol)
            if kept is None or letter is None or not letter.is_tokens:
                continue
            cut = next(item for n, item in self.tokens[name].memory.items() if n.name == node.name)
            inside = held_by(cut, named[name].chosen[self.now].places)
            kept[inside] = raw[inside]
        taken = any(letter is not None and letter.is_tokens for letter in letters)
        return kept.clone() if taken and kept is not None else raw

    def _weights(self, row: Row, letter: Letter, computed: Sequence[int]) -> tuple[float, ...]:
        return coefficients(
            letter,
            self.now,
            computed,
            steps=self.plan.steps,
            first_forecast=row.actions.index(letter.symbol),
            listed=row.listed(self.now),
        )


def numbered(cut: TokenCut) -> tuple[Tensor, Tensor, Tensor]:
    """Of each entry of a cut's value its row and its token, and whether it is any token's."""
    factors = [factor for dimension in cut.layout for factor in dimension]
    grids = torch.meshgrid([torch.arange(factor.size) for factor in factors], indexing="ij")
    inside = torch.ones([factor.size for factor in factors], dtype=torch.bool)
    numbers = {kind: torch.zeros(inside.shape, dtype=torch.int64) for kind in ("row", "token", "other")}
    for factor, entries in zip(factors, grids, strict=True):
        if factor.window is not None:
            own = entries - factor.window.start
            inside &= (own >= 0) & (own < factor.window.count)
            entries = (own + factor.window.first).clamp(0, cut.tokens - 1)
        numbers[factor.kind] += entries * factor.stride
    shape = value_of(cut.value).shape
    return numbers["row"].view(shape), numbers["token"].view(shape), inside.view(shape)


def held_by(cut: TokenCut, places: Tensor) -> Tensor:
    """Which entries of a cut's value are of the chosen tokens."""
    rows, tokens, inside = numbered(cut)
    chosen_ones = torch.zeros(cut.rows, cut.tokens, dtype=torch.bool).scatter(1, places.cpu(), True)
    return (chosen_ones[rows, tokens] & inside).to(places.device)


def weighted(history: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """c_0·h_0 + c_1·h_1 + …, newest first, in fp32 at least; what is missing is the newest."""
    dtype = history[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = None
    for i, weight in enumerate(weights):
        entry = history[i] if i < len(history) else history[0]
        term = entry.to(wide) * torch.tensor(weight, dtype=wide)
        total = term if total is None else total + term
    assert total is not None
    return total.to(dtype)


def unpacked(history: Sequence[Tensor], weight: float) -> Tensor:
    """The newest value in bfloat16, moved along its difference to the one before in 127 levels a token."""
    newest = history[0]
    wide = torch.promote_types(newest.dtype, torch.float32)
    value = newest.bfloat16().to(wide)
    if weight and len(history) > 1:
        difference = newest.to(wide) - history[1].bfloat16().to(wide)
        scale = difference.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        value = value + (difference / scale).round() * scale * weight
    return value.to(newest.dtype)


class _Step(fx.Interpreter):
    """One evaluation, node by node."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference.captured.step.module, garbage_collect_values=False)
        self.reference = reference
        self.bypassed: dict[tuple[int, int, fx.Node], Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        return self.reference.obtained(n, super().run_node(n), self)

    def bypass(self, cut: Range, node: fx.Node) -> Any:
        """The value of `node` if every residual add of the range passed its stream through."""
        if node in cut.streams:
            return self.bypass(cut, cut.streams[node])
        if not _comes_after(node, cut):
            return self.env[node]
        key = (cut.first, cut.last, node)
        if key not in self.bypassed:
            args = fx.map_arg(node.args, lambda item: self.bypass(cut, item))
            kwargs = fx.map_arg(node.kwargs, lambda item: self.bypass(cut, item))
            self.bypassed[key] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.bypassed[key]


def _comes_after(node: fx.Node, cut: Range) -> bool:
    todo, seen = [node], set[fx.Node]()
    while todo:
        item = todo.pop()
        if item in cut.streams:
            return True
        if item not in seen:
            seen.add(item)
            todo.extend(item.all_input_nodes)
    return False


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


@dataclass(frozen=True)
class Subject:
    """A model of the zoo with the capture of one of its calls, shared by the tests of a process."""

    case: Case
    model: nn.Module
    captured: Captured
    batch: int = 2
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def static(self) -> dict[str, Any]:
        return cast(self.case.static(self.batch), self.dtype, self.device)

    def latents(self, seed: int = 0) -> Tensor:
        return self.case.latents(self.batch, seed).to(self.device, self.dtype)

    def call(self, static: dict[str, Any], latents: Tensor, t: float) -> dict[str, Any]:
        """All keyword arguments of one step; those of `static` stay the same objects."""
        return cast(self.case.call(static, latents, t), None, self.device)

    def transform(self, plan: Plan, **options: Any) -> nn.Module:
        """`graphcache.transform` with the capture already made, the plan checked as with example inputs."""
        made = graphcache.transform(self.model, plan, timestep=self.case.timestep, **options)
        engine = engine_of(made)
        kwargs = self.call(self.static(), self.latents(), 1.0)
        key, _ = engine.binder.signature(engine.binder.bind((), kwargs))
        program = Program(self.captured, engine.maker.backend)
        program.check(plan)
        engine.maker.programs.add(engine.maker.key(key, (), begins=True), program)
        engine.maker.variants.captured()
        return made

    def reference(self, plan: Plan, start: int = 0) -> Callable[..., Any]:
        """The reference interpreter behind the model's own keyword arguments."""
        run = Reference(self.captured, plan, start)
        binder = Binder(forward_parameters(self.model))
        return lambda **kwargs: run(binder.signature(binder.bind((), kwargs))[1])

    def sample(
        self, call: Callable[..., Any], steps: int, start: int = 0, static: dict[str, Any] | None = None
    ) -> list[Any]:
        """The results of every step from `start` on; each updates the latents by a small Euler step."""
        fixed = self.static() if static is None else static
        latents, results = self.latents(), []
        for step in range(start, steps):
            results.append(call(**self.call(fixed, latents, 1 - step / steps)))
            latents = latents - self.case.prediction(results[-1]) / steps
        return results


@functools.cache
@own_numbers
def subject(name: str, batch: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Subject:
    case = CASES[name]
    model = case.make().to(device, dtype)
    static, latents = cast(case.static(batch), dtype), case.latents(batch).to(dtype)
    call = cast(case.call(static, latents, 1.0), None, device)
    return Subject(case, model, capture_call(model, call, case.timestep), batch, dtype, device)


def capture_call(
    model: nn.Module, kwargs: Mapping[str, Any], timestep: str | None, latents: tuple[str, ...] = ()
) -> Captured:
    """The model's step for one call, before any plan."""
    binder = Binder(forward_parameters(model), Names(timestep, latents))
    bound = binder.bind((), dict(kwargs))
    return Captured.of(model, CallSpec.of(binder, bound), binder.signature(bound)[1])


def runner_tensors(model: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """A call's flat inputs, in signature order."""
    binder = Binder(forward_parameters(model))
    return binder.signature(binder.bind((), dict(kwargs)))[1]


def cast(arguments: Any, dtype: torch.dtype | None, device: str = "cpu") -> Any:
    """Every tensor on a device, and every floating-point tensor in another dtype."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    return torch.utils._pytree.tree_map(convert, arguments)


def assert_same(actual: Any, expected: Any) -> None:
    """Bit for bit, NaNs included, in the same structure."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
