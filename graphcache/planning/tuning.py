"""`tune`: a plan's listed coefficients, trained through the sampler."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from graphcache.compiler.exchanges import ON_THE_WAY_BACK, answered, total
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.letter import Letter
from graphcache.ir.plan import COMPUTE, Plan
from graphcache.ir.promise import Promise
from graphcache.planning.agreement import of_first, refuse_others
from graphcache.planning.gradient_memory import MEMORY, GradientMemory
from graphcache.planning.references import Aim, References, made_for
from graphcache.planning.sampling import Sampler, Sampling, with_frozen_weights
from graphcache.planning.subject import refuse_rounding
from graphcache.planning.tuning_engine import TuningEngine, Weights
from graphcache.runtime.closeness import LEAST_ERROR, decibels, psnr

MOST_RATE = 0.05
"""Coefficients are near 1: larger updates of them are not small."""


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
    mesh: Any = None,
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
        mesh: the ranks that share every evaluation, as for `transform`; all of them get the same plan.
        memory: bytes that this may take, on each rank, beside the model and what capturing left. What does
            not fit is computed again, at last stretch by stretch; on a CPU it changes no bit of the result.

    Raises:
        GraphCacheError: the plan lists no coefficients, or none that reaches the result, or the sampler is
            random or does not converge, or `memory` is too little.
    """
    for name, given in (("samples", samples), ("held_out", held_out)):
        if not given:
            raise GraphCacheError(f"{name} is empty: tuning needs at least one sample there")
    # references are told apart as objects, and a range makes new ones at every look
    samples, held_out = list(samples), list(held_out)
    sampling = Sampling.of(model_or_pipe, sampler, timestep, latents, mesh=mesh)
    references = made_for(reference, sampling, plan.steps)
    weights = Weights(plan)
    refuse_others(
        sampling.mesh, plan=str(plan), samples=len(samples), held_out=len(held_out), iterations=iterations,
        rate=rate, every=every, patience=patience, memory=memory,
    )  # fmt: skip
    engines = [
        TuningEngine(one, weights, sampling.names, sampling.pipe, sampling.ranks) for one in sampling.models
    ]
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
        return of_first(sampling.mesh, decibels(results, held_targets, data_range))

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
        with answered(ON_THE_WAY_BACK):
            torch.autograd.backward(-error, inputs=trained)
            add_up(trained, sampling)
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


def add_up(trained: Sequence[nn.Parameter], sampling: Sampling) -> None:
    """Give every rank of a mesh the sum of all ranks' gradients, bit for bit the same."""
    known = [parameter.grad for parameter in trained if parameter.grad is not None]
    if not sampling.ranks or not known:
        return
    device = next(sampling.models[0].parameters()).device
    flat = total(torch.cat([gradient.flatten() for gradient in known]).to(device), sampling.ranks)
    sums = of_first(sampling.mesh, flat.cpu())
    parts = torch.split_with_sizes(sums, [gradient.numel() for gradient in known])
    for gradient, part in zip(known, parts, strict=True):
        gradient.copy_(part.reshape(gradient.shape))


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
