"""A model that hands out what every site computes, and its gradients, while a sampler runs it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graphcache.compiler.captured import laid
from graphcache.compiler.code import build
from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.pipeline import observed
from graphcache.compiler.program import Program
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import Input
from graphcache.libraries.exclusive import COMPILING
from graphcache.libraries.torch_private import tree_flatten, tree_unflatten
from graphcache.planning.evaluation import Evaluation, Tensors, ambient
from graphcache.planning.gradient_memory import GradientMemory, with_own_inputs
from graphcache.planning.holdings import Holding, Rows
from graphcache.planning.in_stretches import InStretches
from graphcache.planning.profile_memory import Share
from graphcache.runtime.engine import Engine
from graphcache.runtime.options import Options
from graphcache.runtime.runner import BranchState, end, feed, run_prologue
from graphcache.runtime.session import CallSlot


class Observer(Protocol):
    """Told of every evaluation and its sites, and of every site again on the way back, last first."""

    def called(self, step: int, model: nn.Module) -> None: ...

    def saw(
        self, step: int, branch: CallSlot, site: str, values: Tensors, held: Sequence[Holding]
    ) -> None: ...

    def pulled(
        self,
        step: int,
        branch: CallSlot,
        site: str,
        values: Tensors,
        gradients: Tensors,
        rows: Sequence[Rows],
    ) -> None: ...


class ProbeEngine(Engine):
    """Runs a model as it is and shows an observer what its sites compute.

    Gradients flow from the results through the evaluations to the latents. What they need is held for the
    first evaluations, as far as the share of memory for that goes; the others are computed again on the way
    back.
    """

    observer: Observer
    share: Share
    left: GradientMemory
    asked: Mapping[int, Tensor] | None = None
    """The present call's tensors with a gradient, by their numbers; None without gradients."""

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        pipe: Any = None,
        ranges: tuple[tuple[str, int, int], ...] = (),
        branches: bool = True,
    ) -> None:
        super().__init__(model, options, pipe)
        self.ranges = ranges
        self.branches = branches
        self.latest: Evaluation | None = None
        self._held: list[Evaluation] = []
        self._probes: WeakKeyDictionary[Program, InStretches] = WeakKeyDictionary()

    @contextmanager
    def observed_by(self, observer: Observer, share: Share, left: GradientMemory) -> Iterator["ProbeEngine"]:
        """One with sessions of its own that shares what was captured; in the end it holds nothing.

        `left` is for the evaluations that are held, of all models of the generation.
        """
        kind, given = self.__reduce__()
        made = kind(*given)
        made.maker, made._probes, made.observer = self.maker, self._probes, observer
        made.share, made.left = share, left
        try:
            yield made
        finally:
            # a scheduler may keep results, and with them the evaluations behind them
            for evaluation in made._held:
                evaluation.held = None

    def __reduce__(self) -> tuple[type["ProbeEngine"], tuple[Any, ...]]:
        """Another process captures by itself."""
        return ProbeEngine, (self.model, self.options, self.driver.given, self.ranges, self.branches)

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
        with self.in_step(branch, state, tensors):
            return self._evaluated(branch, state, tensors)

    def _evaluated(self, branch: CallSlot, state: BranchState, tensors: Sequence[Tensor]) -> Any:
        captured = state.program.captured
        self.observer.called(state.step, self.model)
        inputs = laid(captured.strides, tensors)
        if state.watched is None:
            run_prologue(state, tensors, inputs)
        probed = self.probe(state.program)
        fed = with_own_inputs(probed.runnable, feed(state.cache, probed.runnable, inputs, state.now))
        evaluation = self.latest = Evaluation(
            probed,
            dict(zip(probed.stretches.inputs, fed, strict=True)),
            self._asked(probed, tensors),
            ambient(tensors[captured.call.latents[0]]),
            self.share.stride,
            mesh=self.options.mesh,
            saw=partial(self.observer.saw, state.step, branch),
            pulled=partial(self.observer.pulled, state.step, branch),
        )
        hold = self.asked is not None and self.left.takes(probed.runnable)
        results = evaluation.run(hold)
        if hold:
            self._held.append(evaluation)
            # samplers may change these in place
            results = [result.clone() for result in results]
        if probed.folded is None:
            probed.folded = evaluation.folding()
        if state.finished:
            end(state)
        return captured.output.build(results)

    def _asked(self, probed: InStretches, tensors: Sequence[Tensor]) -> dict[int, str]:
        """The placeholders of what has a gradient, by the leaves' numbers."""
        found: dict[int, str] = {}
        for port, name in zip(probed.runnable.step.inputs, probed.stretches.inputs, strict=True):
            if isinstance(port, Input):
                fed, asked = tensors[port.index], self.asked or {}
                found |= {number: name for number, leaf in asked.items() if leaf is fed}
        return found

    def probe(self, program: Program) -> InStretches:
        """A program's graph that hands out its sites."""
        known = self._probes.get(program)
        if known is None:
            step = program.captured.step
            if step.homes:
                raise CaptureError("offloaded weights have no gradients; profile with them on the device")
            branches = tuple(branch.name for branch in step.block_branches) if self.branches else ()
            with COMPILING:
                shards = program.shards(self.ranges)
                graph = observed(program.step, branches, self.ranges, shards)
                made = Runnable(graph, build(graph, None))
            probed = InStretches.probed(made, program.captured.output.count, shards)
            known = self._probes.setdefault(program, probed)
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
        found = ctx.evaluation.back(gradients)
        given: list[Any] = [None] * ctx.amount
        for number, gradient in found.items():
            given[number] = gradient
        return None, None, None, *given


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
