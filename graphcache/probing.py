"""A model that hands out what every site computes, and its gradients, while a sampler runs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphcache.compile import build
from graphcache.engine import Engine, Options
from graphcache.ir.graph import CacheWrite, Input
from graphcache.passes.base import run
from graphcache.passes.probe import Probe, handle
from graphcache.program import Program, Runnable, laid
from graphcache.runner import BranchState, end, feed, run_prologue
from graphcache.session import Branch

OUTPUT = "output"

Values = Mapping[str, tuple[Tensor, ...]]
"""What the sites of one evaluation computed, or its gradients: a tuple of a site's tensors."""


class Observer(Protocol):
    """Told of every evaluation, and of every one again on the way back, last step first."""

    def saw(self, step: int, branch: Branch, values: Values) -> None: ...

    def pulled(self, step: int, branch: Branch, values: Values, gradients: Values) -> None: ...


@dataclass
class _Probed:
    """A program's graph that hands out its sites; which of them are `folded` is known after its first run."""

    program: Program
    runnable: Runnable
    folded: frozenset[tuple[str, int]] | None = None


@dataclass
class _Evaluation:
    """One evaluation as a function of its inputs, run again on the way back."""

    step: int
    branch: Branch
    observer: Observer
    probed: _Probed
    tensors: Sequence[Tensor]
    feed: list[Tensor]
    count: int

    def place(self, leaf: Tensor) -> int | None:
        """Where the graph is fed one of the call's tensors; None if it does not read it."""
        index = next(i for i, tensor in enumerate(self.tensors) if tensor is leaf)
        ports = enumerate(self.probed.runnable.step.inputs)
        return next((i for i, port in ports if isinstance(port, Input) and port.index == index), None)

    def again(self, places: Sequence[int]) -> "_Evaluation":
        """The same with gradients of what it is fed at these places, and of the latents."""
        fed = list(self.feed)
        # with frozen weights a first step's sites depend on nothing else that has a gradient
        for place in {*places, self.latents}:
            fed[place] = fed[place].detach().requires_grad_()
        return replace(self, feed=fed)

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
        for name, changed in replace(self, feed=fed).run()[1].items():
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

    def run(self) -> tuple[Sequence[Tensor], Values, Values]:
        """The results, the sites' values, and what their gradients are taken of."""
        results = self.probed.runnable.call(*self.feed)
        parts: dict[str, list[Tensor]] = {OUTPUT: list(results[: self.count])}
        for port, value in zip(self.probed.runnable.step.outputs, results, strict=True):
            if isinstance(port, CacheWrite):
                parts.setdefault(port.site, []).append(value)
        values = {name: tuple(tensors) for name, tensors in parts.items() if "|" not in name}
        sources = {name: tuple(parts.get(handle(name), tensors)) for name, tensors in values.items()}
        return results[: self.count], values, sources


class ProbeEngine(Engine):
    """Runs a model as it is and shows an observer what its sites compute.

    Gradients flow from the results through the evaluations to the latents. None is kept: each is computed
    again on the way back.
    """

    observer: Observer

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        pipe: Any = None,
        ranges: tuple[tuple[str, int, int], ...] = (),
    ) -> None:
        super().__init__(model, options, pipe)
        self.ranges = ranges
        self.latest: _Evaluation | None = None
        self._probes: dict[int, _Probed] = {}

    def observed_by(self, observer: Observer) -> "ProbeEngine":
        """One with sessions of its own that shares what was captured."""
        made = ProbeEngine(self.model, self.options, self.driver.pipe, self.ranges)
        made.programs, made._probes, made._watch = self.programs, self._probes, self._watch
        made._lock, made.observer = self._lock, observer
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process captures by itself."""
        return ProbeEngine, (self.model, self.options, self.driver.pipe, self.ranges)

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return super().__call__(args, kwargs)
        leaves, structure = pytree.tree_flatten((list(args), kwargs))
        anchor = torch.empty(0, requires_grad=True)
        made: list[Any] = []
        results = _Recomputed.apply(self, structure, made, anchor, *leaves)  # type: ignore[no-untyped-call]
        return made[0](results)

    def evaluate(self, branch: Branch, state: BranchState, tensors: Sequence[Tensor]) -> Any:
        call = state.program.captured.call
        inputs = list(laid(state.program.captured.strides, tensors))
        if state.watched is None:
            run_prologue(state, tensors, inputs)
        for index in (call.latent, call.timestep):
            # samplers may change these in place before they are needed again
            inputs[index] = inputs[index].clone()
        probed = self._probe(state.program)
        fed = feed(state.cache, probed.runnable, inputs, state.now)
        output = state.program.captured.output
        self.latest = _Evaluation(state.step, branch, self.observer, probed, tensors, fed, output.count)
        results, values, _ = self.latest.run()
        if probed.folded is None:
            probed.folded = self.latest.folding(values)
        self.observer.saw(state.step, branch, values)
        if state.finished:
            end(state)
        return output.build(results)

    def _probe(self, program: Program) -> _Probed:
        known = self._probes.get(id(program))
        if known is None:
            branches = tuple(branch.name for branch in program.captured.step.branches)
            step = run((Probe(branches, self.ranges),), program.step)
            live = set(map(id, self.programs.values()))
            for place in self._probes.keys() - live:
                self._probes.pop(place, None)
            known = self._probes[id(program)] = _Probed(program, Runnable(step, build(step, None)))
        return known


class _Recomputed(torch.autograd.Function):
    """An evaluation that keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, engine: ProbeEngine, structure: Any, made: list[Any], *leaves: Any) -> Any:
        detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(detached[1:], structure)
        results, shape = pytree.tree_flatten(Engine.__call__(engine, args, kwargs))
        made.append(lambda values: pytree.tree_unflatten(list(values), shape))
        assert engine.latest is not None
        evaluation = engine.latest
        fed = {
            number: evaluation.place(detached[number])
            for number, leaf in enumerate(leaves)
            if number and isinstance(leaf, Tensor) and leaf.requires_grad
        }
        ctx.evaluation, ctx.amount = evaluation, len(leaves)
        ctx.places = {number: place for number, place in fed.items() if place is not None}
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        places = list(ctx.places.values())
        evaluation = ctx.evaluation.again(places)
        with torch.enable_grad():
            results, values, sources = evaluation.run()
        wanted = [evaluation.feed[place] for place in places]
        sites = [tensor for name in values for tensor in sources[name]]
        pulled = torch.autograd.grad(results, wanted + sites, gradients, allow_unused=True)
        found = iter(pulled[len(places) :])
        pulled_sites = {
            name: tuple(_or_zero(next(found), source) for source in sources[name]) for name in values
        }
        plain = {name: tuple(tensor.detach() for tensor in tensors) for name, tensors in values.items()}
        by_sample = evaluation.by_sample
        evaluation.observer.pulled(
            evaluation.step, evaluation.branch, by_sample(plain), by_sample(pulled_sites)
        )
        given: list[Any] = [None] * ctx.amount
        for number, gradient in zip(ctx.places, pulled, strict=False):
            given[number] = gradient
        return None, None, None, *given


def _or_zero(gradient: Tensor | None, source: Tensor) -> Tensor:
    return torch.zeros_like(source) if gradient is None else gradient
