"""`price`: what plans cost at sizes that the model is not run at."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from graphcache.analysis.cost import graph_flops
from graphcache.analysis.invariant import invariant_values
from graphcache.compiler.captured import Captured
from graphcache.compiler.guidance_half import is_doubled
from graphcache.compiler.histories import entries
from graphcache.compiler.program import Program
from graphcache.cost.sizes import Example
from graphcache.ir.call import Binder, CallSpec
from graphcache.ir.errors import CaptureError, PlanError
from graphcache.ir.graph import StepGraph, has_symbolic_shapes, storage_bytes, value_of
from graphcache.ir.history import PREDICTION, History
from graphcache.ir.plan import Plan
from graphcache.ir.plantext import read_rows
from graphcache.ir.roles import Names
from graphcache.ir.schedule import Role, Schedule
from graphcache.ir.text import describe
from graphcache.libraries.quiet import quiet_shapes
from graphcache.libraries.torch_private import DataDependentOutputException, DynamicOutputShapeException
from graphcache.runtime.engine import original
from graphcache.runtime.guidance_role import role_of
from graphcache.runtime.spoken import Spoken
from graphcache.tracing.capture import forward_parameters
from graphcache.tracing.explanation import user_line
from graphcache.tracing.weightless import settled, sizes_for, weightless

_PREDICTED = History(PREDICTION)


@dataclass(frozen=True)
class Price:
    """What one generation costs under a plan, over all calls of its steps.

    Attributes:
        plan: its name.
        sizes: what was asked for, such as `{"height": 128}`; nothing where the call is as it was given.
        latents: dtype and shape of the latents there.
        steps: of the generation.
        flops: of all products, as the model and its phases run eagerly.
        share: of the FLOPs of the same generation without a plan, those left out that no result needs.
        held_bytes: the most that is kept from one step to the next, values computed once included.
        peak_bytes: the most at any time, which is within a step.
    """

    plan: str
    sizes: Mapping[str, int]
    latents: str
    steps: int
    flops: int
    share: float
    held_bytes: int
    peak_bytes: int


def price(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    plans: Mapping[str, Plan],
    *,
    at: Sequence[Mapping[str, int]] = ({},),
    calls: int = 1,
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
) -> tuple[Price, ...]:
    """Price plans at other sizes of a call.

    The model is captured at every size with fake weights, so that nothing is computed or held that large. One
    that looks at values which its weights have a part in is called for real, at the example's own size alone;
    and a plan for guidance on a doubled batch runs the example once, to learn what its halves are.

    Args:
        model: an nn.Module in eval mode, transformed or not.
        example_inputs: arguments of one call, as a mapping of keywords or a tuple of positions.
        plans: by name.
        at: sizes by name, each beside the example's others: `batch`, `tokens`, `frames`, `height` and `width`
            of the latents, `text`, and further texts by the names of their arguments.
        calls: of the model in a step, 2 where guidance makes two; as many if a plan has a row for these.
        timestep: forward's timestep argument, and
        latents: those that hold the latents, as for `transform`.

    Returns:
        Every plan at the first sizes, then at the next.

    Raises:
        CaptureError: there is no such call of the model, or it can only be captured by running it.
        PlanError: a plan does not fit the model or the call.
    """
    example = _example(model, example_inputs, Names.of(timestep, latents))
    given = example.spec.given_latents(example.tensors)
    roles = {name: _roles(name, plan, given) for name, plan in plans.items()}
    calls = max([calls, *map(len, roles.values())])
    found = []
    for sizes in at:
        sized = {split: _Sized(original(model), example, sizes, split) for split in (False, True)}
        for name, plan in plans.items():
            here = sized[plan.splits_parallel]
            work = [here.work(plan, role) for role in roles[name]]
            if roles[name] == ("only",):
                work *= calls
            found.append(_priced(name, plan, here, work))
    return tuple(found)


def without_weights(
    model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...], names: Names
) -> Program:
    """A call's program that holds no weights; with them where the model looks at values that they make.

    Raises:
        CaptureError: there is no such call of the model.
    """
    return _Sized(original(model), _example(model, example_inputs, names), {}, split=False).program


def _example(model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...], names: Names) -> Example:
    binder = Binder(forward_parameters(original(model)), names)
    by_position = () if isinstance(example_inputs, Mapping) else example_inputs
    by_name = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    bound = binder.bind(by_position, by_name)
    return Example(CallSpec.of(binder, bound), binder.signature(bound)[1])


def cheapest(prices: Sequence[Price]) -> tuple[Price, ...]:
    """Of every call that was priced, the plan of least work; of equal ones that which caches least."""
    best: dict[tuple[str, str], Price] = {}
    for item in prices:
        place = item.latents, str(item.sizes)
        rank = (item.flops, item.peak_bytes)
        if place not in best or rank < (best[place].flops, best[place].peak_bytes):
            best[place] = item
    return tuple(best.values())


def load_prices(path: str | os.PathLike[str]) -> tuple[Price, ...]:
    """Read what `graphcache price --output` wrote.

    Raises:
        GraphCacheError: the file holds something else.
    """
    return read_rows(path, Price, "prices")


def _roles(name: str, plan: Plan, latents: Sequence[torch.Tensor]) -> tuple[Role, ...]:
    """Which calls a step makes, as far as a plan tells them apart."""
    if not plan.is_guided:
        return ("only",)
    if is_doubled(latents):
        return (role_of(plan, "", latents, Spoken()),)
    if plan.conditional is None:
        return "cond", "uncond"
    raise PlanError(
        f"{name} is for guidance on a doubled batch (conditional={plan.conditional}), and the halves of the "
        "example's latents differ; give a call as guidance makes it, or leave conditional= out for two calls"
    )


@dataclass(frozen=True)
class _Work:
    """A plan's calls of one kind: FLOPs of a generation, and what an entry of each history takes."""

    schedule: Schedule
    flops: int
    entries: Mapping[History, int]

    def held(self, step: int) -> int:
        """After a step, without what it hands over to the step's next call."""
        sizes = {**self.entries, _PREDICTED: 0}
        return self.schedule.held(step, sizes) if step >= 0 else 0

    def handed(self, step: int) -> int:
        return self.schedule.steps[step].keep.get(_PREDICTED, 0) * self.entries.get(_PREDICTED, 0)

    def stored(self, step: int) -> int:
        phase = self.schedule.steps[step].phase
        return sum(self.entries[name] for name in self.schedule.stores[phase])


def _priced(name: str, plan: Plan, sized: "_Sized", work: Sequence[_Work]) -> Price:
    flops = sum(item.flops for item in work)
    plain = sized.plain_flops * plan.steps * len(work)
    once = len(work) * sized.once[1]
    held, peak = [0], [0]
    for step in range(plan.steps):
        # the calls of a step follow one another, each with caches of its own
        before, after = ([item.held(step - ago) for item in work] for ago in (1, 0))
        for i, item in enumerate(work):
            handed = sum(other.handed(step) for other in work[:i])
            peak.append(sum(after[:i]) + sum(before[i:]) + handed + item.stored(step) + once)
        if step + 1 < plan.steps:
            held.append(sum(after) + once)
    return Price(
        name,
        dict(sized.sizes),
        describe(sized.tensors[sized.example.latent]),
        plan.steps,
        flops,
        flops / plain if plain else 1.0,
        max(held),
        max(peak),
    )


@dataclass(frozen=True)
class _Sized:
    """The model's step at certain sizes; `split`: with fused branches as two sites."""

    model: nn.Module
    example: Example
    sizes: Mapping[str, int]
    split: bool

    @cached_property
    def _captured(self) -> tuple[list[torch.Tensor], Captured]:
        try:
            return self.example.resized(self.sizes, self._without_weights)
        except CaptureError as error:
            if not self.sizes:
                return list(self.example.tensors), self._as_it_is
            raise CaptureError(
                f"{error}. To price a call of another kind, give it as the example, with no other sizes: "
                "what cannot be captured without the weights is then called once"
            ) from error

    def _without_weights(self, tensors: Sequence[torch.Tensor]) -> Captured:
        try:
            with quiet_shapes():
                return self._of(weightless(self.model), tensors)
        except CaptureError as error:
            if isinstance(error.__cause__, (DataDependentOutputException, DynamicOutputShapeException)):
                raise CaptureError(
                    f"the model looks at values that its weights have a part in{user_line(error.__cause__)}"
                ) from error
            raise

    @cached_property
    def _as_it_is(self) -> Captured:
        """The example, with the model's weights."""
        return self._of(self.model, self.example.tensors)

    def _of(self, model: nn.Module, tensors: Sequence[torch.Tensor]) -> Captured:
        return Captured.of(model, self.example.spec, tensors, split=self.split)

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        return self._captured[0]

    @cached_property
    def program(self) -> Program:
        return Program(self._captured[1], None)

    @cached_property
    def _sizes(self) -> Mapping[Any, int]:
        """Those within the model that depend on values."""
        step = self.program.captured.step
        return sizes_for(step, self.tensors) if has_symbolic_shapes(step) else {}

    def _counted(self, step: StepGraph) -> StepGraph:
        return settled(step, self._sizes) if self._sizes else step

    @cached_property
    def plain_flops(self) -> int:
        """Of one call of the plain model."""
        return graph_flops(self._counted(self.program.captured.step))

    @cached_property
    def once(self) -> tuple[int, int]:
        """FLOPs of what is computed once per generation, and its bytes."""
        if self.program.prologue is None:
            return 0, 0
        step = self._counted(self.program.prologue.step)
        return graph_flops(step), sum(storage_bytes(value_of(node)) for node in step.results())

    def work(self, plan: Plan, role: Role) -> _Work:
        program = self._doubled(plan) if role == "doubled" else self.program
        shares = role == "only" and any(letter.is_measured for letter in plan.letters)
        shared = shares and is_doubled(self.example.spec.given_latents(self.example.tensors))
        program.check(plan, role)
        schedule = program.schedule(plan, role=role, shared=shared)
        phases = [self._counted(program.phase(schedule, i).step) for i in range(len(schedule.phases))]
        work = list(map(graph_flops, phases))
        flops = self.once[0] + sum(work[step.phase] for step in schedule.steps)
        held = {name: sum(map(storage_bytes, parts)) for name, parts in entries(phases).items()}
        return _Work(schedule, flops, held)

    def _doubled(self, plan: Plan) -> Program:
        """The program with the step of the conditional half, whose inputs are those of the example's half.

        Which values the half has as the whole batch has them is seen in the example.
        """
        real = Program(self._as_it_is, None)
        real.halve(self.model, self.example.tensors, str(plan.conditional))
        assert real.half is not None
        real.schedule(plan, role="doubled")
        inputs = [tensor.contiguous() for tensor in real.half.rows.inputs(self.tensors)]
        captured = self._without_weights(inputs)
        if _shared(real.captured.step, real.half.step) - real.half.hoisted:
            raise CaptureError(
                "row guidance: the conditional half computes other values once a generation than the whole "
                "batch; give a call of this size as the example"
            )
        hoisted = _shared(self.program.captured.step, captured.step)
        half = replace(real.half, step=captured.step, strides=captured.strides, hoisted=hoisted)
        return replace(self.program, half=replace(half, shared=frozenset(), mixed=frozenset()), phases={})


def _shared(whole: StepGraph, half: StepGraph) -> frozenset[str]:
    """What is computed once for a whole batch, of the values that its half has too."""
    return frozenset(invariant_values(whole)) & half.nodes().keys()
