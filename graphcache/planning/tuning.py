"""`tune`: a plan's listed coefficients, trained through the sampler."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint

from graphcache.compiler.phase_code import Runnable
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.graph import Coefficients
from graphcache.ir.history import OUTPUT, range_site
from graphcache.ir.letter import Letter
from graphcache.ir.plan import COMPUTE, Plan
from graphcache.ir.promise import Promise
from graphcache.ir.resolve import resolve
from graphcache.ir.roles import Names
from graphcache.ir.schedule import Phase
from graphcache.planning.evaluation import in_stretches
from graphcache.planning.gradient_memory import MEMORY, GradientMemory, with_own_inputs
from graphcache.planning.in_stretches import InStretches
from graphcache.planning.plan_memory import lowered
from graphcache.planning.profile_memory import Needs, Share
from graphcache.planning.references import Aim, References, made_for
from graphcache.planning.sampling import Sampler, Sampling, with_frozen_weights
from graphcache.planning.subject import refuse_rounding
from graphcache.planning.tuning_memory import cut, tuning_needs
from graphcache.runtime.closeness import LEAST_ERROR, decibels, psnr
from graphcache.runtime.engine import Engine
from graphcache.runtime.options import Options
from graphcache.runtime.runner import BranchState, run_step
from graphcache.runtime.session import CallSlot

MOST_RATE = 0.05
"""Coefficients are near 1: larger updates of them are not small."""
Key = tuple[int, int]
"""(row, step) of listed coefficients."""


@dataclass(frozen=True)
class Iteration:
    """PSNR to the references, mean over samples in decibels, before an update."""

    number: int
    trained: float
    held_out: float | None


@dataclass(frozen=True)
class Tuned:
    """A tuned plan, its curve, mean PSNR of the held-out samples before and after, and that of each after.

    The plan promises what those reached, if they were held against the uncached run.
    """

    plan: Plan
    curve: tuple[Iteration, ...]
    before: float
    after: float
    each: tuple[float, ...]


@with_frozen_weights
def tune(
    model_or_pipe: Any,
    plan: Plan,
    samples: Sequence[Any],
    held_out: Sequence[Any],
    *,
    sampler: Sampler | None = None,
    reference: Aim | References = "uncached",
    iterations: int = 80,
    rate: float | None = None,
    every: int = 10,
    patience: int = 4,
    data_range: float = 2.0,
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    memory: int = MEMORY,
    progress: Callable[[Iteration], None] = lambda iteration: None,
) -> Tuned:
    """Train the coefficients that a plan's rows list, with Adam, on the distance to reference results.

    Each iteration runs one sample through the whole sampler and back. Of each step the sum of the
    coefficients and the shares of the older entries are trained, since the newest entries nearly agree.

    Args:
        model_or_pipe: as for `profile`.
        plan: with `fitted` or `tuned` letters; `with_corrections` lets computed steps be tuned as well.
        samples: trained on in turn.
        held_out: judge the plan; the best one for them is returned.
        reference: "uncached", the same run computed whole; "converged", the limit of many steps; or such
            results of this model, of which some may be there.
        iterations: updates, at most.
        rate: Adam's, falling to a tenth along a cosine. By default the first update would gain one decibel
            if error were linear in the coefficients: the better a plan, the smaller its rate.
        every: updates between two looks at the held-out samples.
        patience: looks without a gain that are borne; one more stops it.
        data_range: largest minus smallest value of a result, for the decibels.
        timestep: the name of the timestep argument, if it is not found.
        latents: those of the latents, as for `transform`.
        memory: bytes that this may take beside the model and what capturing left. What does not fit is
            computed again, at last stretch by stretch; on a CPU it changes no bit of the result.

    Raises:
        GraphCacheError: the plan lists no coefficients, or none that reaches the result, or the sampler is
            random or does not converge, or `memory` is too little.
    """
    for name, given in (("samples", samples), ("held_out", held_out)):
        if not given:
            raise GraphCacheError(f"{name} is empty: tuning needs at least one sample there")
    # references are told apart as objects, and a range makes new ones at every look
    samples, held_out = list(samples), list(held_out)
    sampling = Sampling.of(model_or_pipe, sampler, timestep, latents)
    references = made_for(reference, sampling, plan.steps)
    weights = Weights(plan)
    engines = [TuningEngine(one, weights, sampling.names, sampling.pipe) for one in sampling.models]
    with torch.enable_grad():
        ((number, call),) = sampling.first_calls(samples[0], plan.steps, 1).items()
        inputs = engines[number].with_gradient(call)
        engines[number].prepare(inputs)
        uncached, calls = references.begun(samples[0])
        count = references.held_with([*samples, *held_out])
        share = engines[number].needs(inputs, calls, uncached, count).share(memory)
    targets, held_targets = references.of(samples), references.of(held_out)
    model = sampling.wrapped(engines)
    trained = list(weights.parameters())

    def judged() -> list[float]:
        results = (sampling.generate(model, sample, plan.steps) for sample in held_out)
        return decibels(results, held_targets, data_range)

    best_plan, best = plan, judged()
    for engine in engines:
        for program in engine.maker.programs.values():
            refuse_rounding(program.captured.step)
    before, stale, curve = fmean(best), 0, list[Iteration]()
    for number in range(iterations):
        turn = number % len(samples)
        left = GradientMemory(share.held)
        for engine in engines:
            engine.share, engine.left = share, left
        result = sampling.generate(model, samples[turn], plan.steps, gradients=True)
        error = psnr(result, targets[turn], data_range, LEAST_ERROR).mean()
        reached = float(error.detach())
        if not math.isfinite(reached):
            raise GraphCacheError(f"iteration {number}: PSNR is {reached}; lower rate=")
        if not error.requires_grad:
            raise GraphCacheError(
                "no coefficient that the plan lists reaches the result: their rows are overridden by later "
                "ones or by the output's, or the sampler detaches what the model returns"
            )
        weights.zero_grad()
        torch.autograd.backward(-error, inputs=trained)
        del result, error  # and what they hold
        for engine in engines:
            engine.reset()  # a model whose turn is over keeps what it has until its next one
        if number == 0:
            rate = decibel_rate(trained) if rate is None else rate
            optimiser = Adam(trained, lr=rate, betas=(0.9, 0.95))
            schedule = CosineAnnealingLR(optimiser, iterations, eta_min=rate / 10)
        optimiser.step()
        schedule.step()
        held = None
        if (number + 1) % every == 0 or number + 1 == iterations:
            reached_there = judged()
            held = fmean(reached_there)
            stale += 1
            if held > fmean(best):
                best, best_plan, stale = reached_there, weights.plan(), 0
        curve.append(Iteration(number, reached, held))
        progress(curve[-1])
        if stale > patience:
            break
    if references.aim == "uncached":
        best_plan = best_plan.promising(Promise.of(best, data_range, sampling.compared(held_out)))
    return Tuned(best_plan, tuple(curve), before, fmean(best), tuple(best))


def decibel_rate(trained: Sequence[Tensor]) -> float:
    """The rate at which an update gains one decibel if error is linear, by gradients in decibels.

    Adam's first update moves every parameter by the rate.
    """
    slope = sum(float(parameter.grad.abs().sum()) for parameter in trained if parameter.grad is not None)
    return 1 / max(slope, 1 / MOST_RATE)


def with_corrections(plan: Plan, symbol: str = "c", handovers: Sequence[int] = ()) -> Plan:
    """The plan with every computed step but a row's first corrected: a·new + b·previous, at first 1 and 0.

    Guidance stays as it is, and so do the steps at which another model takes over: it has no previous value.
    """
    if plan.letter(symbol) is not None:
        raise PlanError(f"the plan has a letter {symbol!r} already; give symbol=")
    rows = []
    for row in plan.rows:
        if row.selector.is_guidance:
            rows.append(row)
            continue
        later = (step for step in range(1, plan.steps) if step not in handovers)
        corrected = [step for step in later if row.actions[step] == COMPUTE]
        actions = "".join(symbol if step in corrected else action for step, action in enumerate(row.actions))
        listed = (*row.coefficients, *((step, (1.0, 0.0)) for step in corrected))
        rows.append(replace(row, actions=actions, coefficients=listed))
    letters = (*plan.letters, Letter(symbol, "tuned compute"))
    return replace(plan, letters=letters, rows=tuple(rows), preset=None)


class Weights(nn.Module):
    """A plan's listed coefficients: by row and step their sum, and the shares of all but the newest entry."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.given = plan
        self.values = nn.ParameterDict()
        for number, row in enumerate(plan.rows):
            for step, listed in row.coefficients:
                start = torch.tensor([sum(listed), *listed[1:]], dtype=torch.float32)
                self.values[_name((number, step))] = nn.Parameter(start)
        if not len(self.values):
            raise GraphCacheError(
                "the plan lists no coefficients, so there is nothing to tune; take one from search(), or "
                "with_corrections(plan)"
            )

    def coefficients(self, key: Key) -> Tensor:
        """Newest entry first."""
        value = self.values[_name(key)]
        return torch.cat([(value[0] - value[1:].sum())[None], value[1:]])

    def plan(self) -> Plan:
        """The plan with the coefficients as they are now."""
        rows = []
        for number, row in enumerate(self.given.rows):
            listed = tuple(
                (step, tuple(self.coefficients((number, step)).tolist())) for step, _ in row.coefficients
            )
            rows.append(replace(row, coefficients=listed))
        return replace(self.given, rows=tuple(rows), preset=None)


def _needing(latent: Tensor) -> Tensor:
    """A tensor that needs a gradient."""
    return latent if latent.requires_grad else latent.clone().requires_grad_()


def _name(key: Key) -> str:
    return f"{key[0]}_{key[1]}"


class TuningEngine(Engine):
    """Runs a model under a plan whose coefficients are parameters.

    What gradients need is held for the first evaluations, as far as the share of memory for that goes; the
    others are computed again on the way back.
    """

    def __init__(self, model: nn.Module, weights: Weights, names: Names, pipe: Any = None) -> None:
        super().__init__(model, Options(weights.given, names=names), pipe)
        # code that is compiled without gradients has none later
        self.maker.adopts = False
        self.weights = weights
        self.share = Share(0)
        self.left = GradientMemory(0)
        self._keys: dict[tuple[Phase, int], dict[int, Key]] = {}
        self._cut: dict[int, InStretches | None] = {}

    def needs(self, inputs: Mapping[str, Any], calls: int, result: Tensor, references: int) -> Needs:
        """What tuning takes where a step makes so many calls like one with these arguments."""
        plan = self.weights.given
        calls_under = lowered(self, inputs, plan, calls)
        return tuning_needs(calls_under, self.cut_once, result.nbytes, references)

    def cut_once(self, runnable: Runnable) -> InStretches | None:
        """A phase's graph in stretches, where it can be cut."""
        if id(runnable) not in self._cut:
            self._cut[id(runnable)] = cut(runnable)
        return self._cut[id(runnable)]

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return super().__call__((), self.with_gradient(self.binder.bind(args, kwargs)))

    def with_gradient(self, bound: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments with latents that need one, as at later steps: that is part of a signature."""
        bound = dict(bound)
        key, tensors = self.binder.signature(bound)
        spec = self.maker.spec(key, bound)
        owner = spec.latent_argument(tensors, "tune")
        held = bound[owner]
        bound[owner] = _needing(held) if isinstance(held, Tensor) else type(held)(map(_needing, held))
        return bound

    def evaluate(self, branch: CallSlot, state: BranchState, tensors: Sequence[Tensor]) -> Any:
        keys, count = self._groups(state), state.program.captured.output.count

        def evaluated(runnable: Runnable, fed: list[Tensor]) -> Sequence[Tensor]:
            for place, port in enumerate(runnable.step.inputs):
                if isinstance(port, Coefficients) and port.group in keys:
                    weights = self.weights.coefficients(keys[port.group])
                    padding = weights.new_zeros(len(fed[place]) - len(weights))
                    fed[place] = torch.cat([weights, padding]).to(fed[place])
            if all(tensor.grad_fn is None for tensor in fed):
                # no coefficient was met yet, or none is trained
                with torch.no_grad():
                    return runnable.call(*fed)
            fed = with_own_inputs(runnable, fed)
            hold, graph = self.left.takes(runnable), self.cut_once(runnable)
            results: Sequence[Tensor]
            if graph is not None:
                results = in_stretches(graph, fed, self.share.stride, hold)
            elif hold:
                results = runnable.call(*fed)
            else:
                results = checkpoint(runnable.call, *fed, use_reentrant=False, preserve_rng_state=False)
            # samplers may change these in place
            return [*(result.clone() for result in results[:count]), *results[count:]]

        return run_step(state, tensors, evaluated)

    def _groups(self, state: BranchState) -> dict[int, Key]:
        """The row and step behind each group of coefficients of the current step."""
        phase = state.schedule.phases[state.now.phase]
        cached = self._keys.get((phase, state.step))
        if cached is not None:
            return cached
        plan, step = self.weights.given, state.program.captured.step
        found = resolve(plan, step.branches, step.blocks)
        rows = dict(found.branches)
        rows |= {range_site(first, last): row for row, first, last in found.ranges}
        rows |= {OUTPUT: found.output} if found.output else {}
        keys: dict[int, Key] = {}
        for history, action in phase.actions:
            site = history.site
            if action.group >= 0 and site in rows and rows[site].listed(state.step) is not None:
                keys.setdefault(action.group, (plan.rows.index(rows[site]), state.step))
        self._keys[phase, state.step] = keys
        return keys
