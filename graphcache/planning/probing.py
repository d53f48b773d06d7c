"""A model that hands out what every site computes, and its gradients, while a sampler runs it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graphcache.compiler.captured import laid
from graphcache.compiler.code import build
from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.pipeline import observed
from graphcache.compiler.program import Program
from graphcache.ir.graph import CacheWrite, Input
from graphcache.ir.history import OUTPUT, History
from graphcache.libraries.exclusive import COMPILING
from graphcache.libraries.torch_private import tree_flatten, tree_unflatten
from graphcache.planning.gradient_memory import GradientMemory, with_own_inputs
from graphcache.runtime.engine import Engine
from graphcache.runtime.options import Options
from graphcache.runtime.runner import BranchState, end, feed, run_prologue
from graphcache.runtime.session import CallSlot

Values = Mapping[str, tuple[Tensor, ...]]
"""What the sites of one evaluation computed, or its gradients: a tuple of a site's tensors."""


class Observer(Protocol):
    """Told of every evaluation, and of every one again on the way back, last step first."""

    def saw(self, step: int, branch: CallSlot, values: Values) -> None: ...

    def pulled(self, step: int, branch: CallSlot, values: Values, gradients: Values) -> None: ...


@dataclass
class _Probed:
    """A program's graph that hands out its sites; which of them are `folded` is known after its first run."""

    program: Program
    runnable: Runnable
    folded: frozenset[tuple[str, int]] | None = None


class _Run(NamedTuple):
    """An evaluation's results, its sites' values, and what their gradients are taken of."""

    results: Sequence[Tensor]
    values: Values
    sources: Values


@dataclass
class _Evaluation:
    """One evaluation as a function of its inputs; run again on the way back unless it is held.

    `tensors` are the call's; `asked` those of them with a gradient, by their numbers among its leaves;
    `autocast` is the state that it runs under.
    """

    step: int
    branch: CallSlot
    observer: Observer
    probed: _Probed
    tensors: Sequence[Tensor]
    feed: list[Tensor]
    count: int
    asked: Mapping[int, Tensor]
    autocast: torch.autocast
    held: _Run | None = None

    @cached_property
    def places(self) -> dict[int, int]:
        """Where the graph is fed the tensors with a gradient that it reads, by their numbers."""
        found: dict[int, int] = {}
        for place, port in enumerate(self.probed.runnable.step.inputs):
            if isinstance(port, Input):
                fed = self.tensors[port.index]
                found |= {number: place for number, leaf in self.asked.items() if leaf is fed}
        return found

    def run_with_gradients(self) -> _Run:
        """Run with gradients of what has one, and of the latents."""
        # with frozen weights a first step's sites depend on nothing else that has a gradient
        for place in {*self.places.values(), self.latents}:
            self.feed[place] = self.feed[place].detach().requires_grad_()
        with torch.enable_grad(), self.autocast:
            return self.run()

    @property
    def latents(self) -> int:
        """Where the graph is fed the latents."""
        ports = enumerate(self.probed.runnable.step.inputs)
        return next(i for i, port in ports if isinstance(port, Input) and port.kind == "latent")

    def folding(self, values: Values) -> frozenset[tuple[str, int]]:
        """The tensors, by site and place, of which every sample has several rows in a row: those whose first
        rows alone move when the first sample's latents do. `values` are what this evaluation computed.
        """
        fed = list(self.feed)
        latents = fed[self.latents] = fed[self.latents].clone()
        latents[0] += 1
        samples, found = len(latents), set()
        for name, changed in replace(self, feed=fed).run().values.items():
            for part, (before, after) in enumerate(zip(values[name], changed, strict=True)):
                if before.dim() and len(before) > samples and len(before) % samples == 0:
                    moved = (before != after).reshape(samples, -1).any(dim=1)
                    if moved[0] and not moved[1:].any():
                        found.add((name, part))
        return frozenset(found)

    def by_sample(self, values: Values) -> Values:
        """The same with the samples of the latents outermost, where they can be told apart."""
        samples, folded = len(self.feed[self.latents]), self.probed.folded or ()
        return {
            name: tuple(
                tensor.reshape(samples, -1, *tensor.shape[1:]) if (name, part) in folded else tensor
                for part, tensor in enumerate(tensors)
            )
            for name, tensors in values.items()
        }

    def run(self) -> _Run:
        results = self.probed.runnable.call(*self.feed)
        parts: dict[History, list[Tensor]] = {History(OUTPUT): list(results[: self.count])}
        for port, value in zip(self.probed.runnable.step.outputs, results, strict=True):
            if isinstance(port, CacheWrite):
                parts.setdefault(port.history, []).append(value)
        values = {name.site: tuple(tensors) for name, tensors in parts.items() if name.is_value}
        sources = {site: tuple(parts.get(History(site, "handle"), own)) for site, own in values.items()}
        return _Run(results[: self.count], values, sources)


class ProbeEngine(Engine):
    """Runs a model as it is and shows an observer what its sites compute.

    Gradients flow from the results through the evaluations to the latents. What they need is held for the
    first evaluations, up to `memory` bytes; the others are computed again on the way back.
    """

    observer: Observer
    asked: Mapping[int, Tensor] | None = None
    """The present call's tensors with a gradient, by their numbers; None without gradients."""

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        pipe: Any = None,
        memory: int = 0,
        ranges: tuple[tuple[str, int, int], ...] = (),
    ) -> None:
        super().__init__(model, options, pipe)
        self.memory = memory
        self.budget = GradientMemory(memory)
        self.ranges = ranges
        self.latest: _Evaluation | None = None
        self._held: list[_Evaluation] = []
        self._probes: dict[int, _Probed] = {}

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator["ProbeEngine"]:
        """One with sessions of its own that shares what was captured; in the end it holds nothing."""
        kind, given = self.__reduce__()
        made = kind(*given)
        made.maker, made._probes, made.observer = self.maker, self._probes, observer
        try:
            yield made
        finally:
            # a scheduler may keep results, and with them the evaluations behind them
            for evaluation in made._held:
                evaluation.held = None

    def __reduce__(self) -> tuple[type["ProbeEngine"], tuple[Any, ...]]:
        """Another process captures by itself."""
        return ProbeEngine, (self.model, self.options, self.driver.given, self.memory, self.ranges)

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            self.asked = None
            return super().__call__(args, kwargs)
        leaves, structure = tree_flatten((list(args), kwargs))
        anchor = torch.empty(0, requires_grad=True)
        made: list[Any] = []
        results = _Evaluated.apply(self, structure, made, anchor, *leaves)  # type: ignore[no-untyped-call]
        return made[0](results)

    def evaluate(self, branch: CallSlot, state: BranchState, tensors: Sequence[Tensor]) -> Any:
        captured = state.program.captured
        inputs = laid(captured.strides, tensors)
        if state.watched is None:
            run_prologue(state, tensors, inputs)
        probed = self._probe(state.program)
        fed = with_own_inputs(probed.runnable, feed(state.cache, probed.runnable, inputs, state.now))
        self.latest = _Evaluation(
            state.step,
            branch,
            self.observer,
            probed,
            tensors,
            fed,
            captured.output.count,
            self.asked or {},
            _autocast(tensors[captured.call.latents[0]]),
        )
        results, values, _ = self._run(self.latest)
        values = _detached(values)
        if probed.folded is None:
            probed.folded = self.latest.folding(values)
        self.observer.saw(state.step, branch, values)
        if state.finished:
            end(state)
        return captured.output.build(results)

    def _run(self, evaluation: _Evaluation) -> _Run:
        if self.asked is None or not self.budget.takes(evaluation.probed.runnable):
            return evaluation.run()
        evaluation.held = evaluation.run_with_gradients()
        self._held.append(evaluation)
        # samplers may change these in place
        return evaluation.held._replace(
            results=[tensor.detach().clone() for tensor in evaluation.held.results]
        )

    def _probe(self, program: Program) -> _Probed:
        known = self._probes.get(id(program))
        if known is None:
            branches = tuple(branch.name for branch in program.captured.step.block_branches)
            with COMPILING:
                step = observed(program.step, branches, self.ranges)
                made = Runnable(step, build(step, None))
            live = set(map(id, self.maker.programs.values()))
            for place in self._probes.keys() - live:
                self._probes.pop(place, None)
            known = self._probes.setdefault(id(program), _Probed(program, made))
        return known


class _Evaluated(torch.autograd.Function):
    """An evaluation without its graph, which is held, or made again on the way back."""

    @staticmethod
    def forward(ctx: Any, engine: ProbeEngine, structure: Any, made: list[Any], *leaves: Any) -> Any:
        # what holds for the generation is told by its identity
        detached = [leaf.detach() if _needs_gradient(leaf) else leaf for leaf in leaves]
        # the first leaf is the anchor
        engine.asked = {n: detached[n] for n, leaf in enumerate(leaves) if n and _needs_gradient(leaf)}
        args, kwargs = tree_unflatten(detached[1:], structure)
        results, shape = tree_flatten(Engine.__call__(engine, args, kwargs))
        made.append(lambda values: tree_unflatten(list(values), shape))
        assert engine.latest is not None
        ctx.evaluation, ctx.amount = engine.latest, len(leaves)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        evaluation: _Evaluation = ctx.evaluation
        results, values, sources = evaluation.held or evaluation.run_with_gradients()
        places = evaluation.places
        wanted = [evaluation.feed[place] for place in places.values()]
        sites = [tensor for name in values for tensor in sources[name]]
        pulled = torch.autograd.grad(
            results, wanted + sites, gradients, retain_graph=evaluation.held is not None, allow_unused=True
        )
        found = iter(pulled[len(places) :])
        pulled_sites = {
            name: tuple(_or_zero(next(found), source) for source in sources[name]) for name in values
        }
        by_sample = evaluation.by_sample
        evaluation.observer.pulled(
            evaluation.step, evaluation.branch, by_sample(_detached(values)), by_sample(pulled_sites)
        )
        given: list[Any] = [None] * ctx.amount
        for number, gradient in zip(places, pulled, strict=False):
            given[number] = gradient
        return None, None, None, *given


def _autocast(like: Tensor) -> torch.autocast:
    """The present state for a tensor's device, to be entered again."""
    kind = like.device.type
    enabled = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, torch.get_autocast_dtype(kind) if enabled else None, enabled)


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _detached(values: Values) -> Values:
    return {name: tuple(tensor.detach() for tensor in tensors) for name, tensors in values.items()}


def _or_zero(gradient: Tensor | None, source: Tensor) -> Tensor:
    return torch.zeros_like(source) if gradient is None else gradient
