"""What a model's steps and plans cost at sizes it was never run at, and how long that takes on a device."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import nn

from graphcache.analysis.symbolic import CostError, Sized, SymbolicShapes, among, listed, solve, symbol
from graphcache.cost.size_search import Example, SizedProgram, vary
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import StepGraph
from graphcache.ir.history import History
from graphcache.ir.plan import Plan
from graphcache.ir.roles import Names
from graphcache.ir.schedule import Action, Budget, Role, Schedule
from graphcache.libraries.extras import require
from graphcache.runtime.engine import Engine, original
from graphcache.runtime.options import Options

Key = tuple[Budget, Any]
"""A token budget and the number of tokens that it is taken of, an expression."""


@dataclass(frozen=True)
class PlanCost:
    """Expressions for one generation under a plan: FLOPs, bytes moved, and the most bytes cached at once."""

    flops: Any
    moved: Any
    peak: Any
    steps: int


@dataclass(frozen=True)
class CostModel:
    """FLOPs and bytes of a model as expressions in its sizes, solved from `captures`, the base's first.

    `fixed` says of every size that could not be varied why; its number stands in the expressions. `at` puts
    numbers in the places of the symbols.
    """

    captures: tuple[SizedProgram, ...]
    fixed: Mapping[str, str]
    base: Mapping[str, int]
    _plans: dict[tuple[Plan, Role], PlanCost] = field(default_factory=dict)

    @property
    def symbols(self) -> dict[str, Any]:
        """The sizes that the expressions are in."""
        return {name: symbol(name) for name in self.captures[0].sizes}

    @cached_property
    def call(self) -> SymbolicShapes:
        """One call of the untouched model."""
        return self._solved([capture.program.captured.step for capture in self.captures])

    @cached_property
    def step(self) -> SymbolicShapes:
        """One step, without what is computed once per generation."""
        return self._solved([capture.program.step for capture in self.captures])

    @cached_property
    def prologue(self) -> SymbolicShapes | None:
        """What is computed once per generation; None when that is nothing."""
        runnables = [capture.program.prologue for capture in self.captures]
        if runnables[0] is None:
            return None
        return self._solved([item.step for item in runnables if item is not None])

    @cached_property
    def site_flops(self) -> dict[str, Any]:
        """FLOPs of every site in one step; what sites share is divided between them."""
        return self.step.branch_flops()

    @property
    def step_flops(self) -> Any:
        """FLOPs of one step, without what is computed once per generation."""
        return self.step.total_flops

    @property
    def prologue_flops(self) -> Any:
        """FLOPs of what is computed once per generation."""
        return self.prologue.total_flops if self.prologue else sympy.S.Zero

    def plan_flops(self, plan: Plan, role: Role = "only") -> Any:
        """FLOPs of one generation: the prologue once and each step's phase."""
        return self.plan(plan, role).flops

    def plan_bytes(self, plan: Plan, role: Role = "only") -> Any:
        """The most bytes that the caches hold at any time of a generation, hoisted values not counted."""
        return self.plan(plan, role).peak

    def plan(self, plan: Plan, role: Role = "only") -> PlanCost:
        """All that a generation under a plan costs, for calls of this role.

        Raises:
            PlanError: the plan does not fit the model, or is for a doubled batch.
            CostError: a phase of the plan has a dimension without an expression.
        """
        if role == "doubled" or (role == "only" and plan.is_guided):
            raise PlanError(
                "guidance on a doubled batch has no cost expression; give role='cond' or 'uncond' for one of "
                "two calls, or leave the guidance row out"
            )
        if (plan, role) not in self._plans:
            self._plans[plan, role] = self._priced(plan, role)
        return self._plans[plan, role]

    def at(self, **sizes: int) -> "Costs":
        """Numbers at these sizes; those left out are the example's.

        Raises:
            CostError: a size is unknown, could not be varied, or is none that the model takes.
        """
        for name, size in sizes.items():
            if name in self.fixed and size != self.base.get(name):
                number = self.base[name]
                raise CostError(f"{name}={size}: it could not be varied from {number}: {self.fixed[name]}")
            if name not in self.base:
                raise CostError(f"{name}={size} is no size of this model; it has {', '.join(self.base)}")
        at = {name: sizes.get(name, self.base[name]) for name in self.symbols}
        costs = Costs(self, at)
        for dimension in self.call.dimensions:
            value = costs.value(dimension)
            if not value.is_Integer or (value <= 0 and dimension != 0):
                raise CostError(
                    f"{listed(at)}: a dimension would be {dimension} = {value}; no such call fits"
                )
        return costs

    def _solved(self, steps: Sequence[StepGraph]) -> SymbolicShapes:
        if len(steps) < len(self.captures):
            raise CostError("at other sizes nothing is computed once per generation; fix one of the sizes")
        sizes = (capture.sizes for capture in self.captures)
        return solve([Sized(size, step) for size, step in zip(sizes, steps, strict=True)])

    def _priced(self, plan: Plan, role: Role) -> PlanCost:
        schedules = [capture.program.schedule(plan, role=role) for capture in self.captures]
        phases = [self._phase(schedules, index) for index in range(len(schedules[0].phases))]
        entries = {history: size for phase in phases for history, size in phase.entries.items()}
        steps = [phases[step.phase] for step in schedules[0].steps]
        once = self.prologue.total_bytes if self.prologue else sympy.S.Zero
        flops = sympy.Add(self.prologue_flops, *(phase.flops for phase in steps))
        moved = sympy.Add(once, *(phase.moved for phase in steps))
        return PlanCost(sympy.expand(flops), sympy.expand(moved), _peak(schedules[0], entries), len(steps))

    def _phase(self, schedules: Sequence[Schedule], index: int) -> "_PhaseCost":
        """Solve a phase with each of its token budgets as one more size, and put the budgets in."""
        streams = {branch.name: self.call.shape(branch.stream) for branch in self.call.step.branches}
        tokens = {name: shape[1] for name, shape in streams.items() if len(shape) == 3}
        wanted = _budgets(schedules[0], index, tokens)
        names = {key: f"budget{number}" for number, key in enumerate(wanted)}
        sizes = _budget_sizes([_least_tokens(wanted, capture.sizes) for capture in self.captures], names)
        graphs = []
        for capture, schedule, counts in zip(self.captures, schedules, sizes[0], strict=True):
            graphs.append(_sized(capture, schedule, index, tokens, names, counts))
        for counts in sizes[1]:
            graphs.append(_sized(self.captures[0], schedules[0], index, tokens, names, counts))
        shapes = solve(graphs)
        numbers = {symbol(names[key]): _number(*key) for key in wanted}
        return _PhaseCost(
            shapes.total_flops.subs(numbers),
            shapes.total_bytes.subs(numbers),
            {name: size.subs(numbers) for name, size in shapes.stored_bytes().items()},
        )


@dataclass(frozen=True)
class _PhaseCost:
    flops: Any
    moved: Any
    entries: Mapping[History, Any]


@dataclass(frozen=True)
class Costs:
    """A cost model's numbers at given sizes: FLOPs and bytes are whole numbers, parts of one rounded down."""

    model: CostModel
    sizes: Mapping[str, int]

    def value(self, expression: Any) -> Any:
        """An expression of the model at these sizes, a sympy number."""
        return sympy.sympify(expression).subs({symbol(name): size for name, size in self.sizes.items()})

    @property
    def site_flops(self) -> dict[str, int]:
        return {name: int(self.value(flops)) for name, flops in self.model.site_flops.items()}

    @property
    def step_flops(self) -> int:
        return int(self.value(self.model.step_flops))

    @property
    def prologue_flops(self) -> int:
        return int(self.value(self.model.prologue_flops))

    def plan_flops(self, plan: Plan, role: Role = "only") -> int:
        return int(self.value(self.model.plan_flops(plan, role)))

    def plan_bytes(self, plan: Plan, role: Role = "only") -> int:
        return int(self.value(self.model.plan_bytes(plan, role)))

    def plan_moved(self, plan: Plan, role: Role = "only") -> int:
        return int(self.value(self.model.plan(plan, role).moved))

    def plan_seconds(self, plan: Plan, device: "Device", role: Role = "only") -> float:
        """Seconds of one generation on a device."""
        return device.seconds(self.plan_flops(plan, role), self.plan_moved(plan, role), plan.steps)


@dataclass(frozen=True)
class Device:
    """Seconds a FLOP, a byte moved and a step; `residuals` are (predicted - measured) / measured."""

    flop: float
    byte: float
    step: float
    residuals: tuple[float, ...] = ()

    @staticmethod
    def fit(rows: Iterable[tuple[float, float, float]]) -> "Device":
        """The constants that explain measured steps, none negative, by the least squares of relative errors.

        Args:
            rows: FLOPs, bytes moved and measured seconds of one step each.

        Raises:
            GraphCacheError: scipy is not installed.
            CostError: there are fewer than three rows, or a number is none that could be measured.
        """
        optimize = require("scipy.optimize", "examples", "fitting a device's constants")
        table = torch.tensor([tuple(row) for row in rows], dtype=torch.float64)
        if table.dim() != 2 or table.shape[0] < 3 or table.shape[1] != 3:
            raise CostError("a device's three constants need three or more rows (flops, bytes, seconds)")
        if not table.isfinite().all() or (table < 0).any() or (table[:, 2] == 0).any():
            raise CostError("a row has a negative or infinite number, or no seconds; measure it again")
        seconds = table[:, 2:]
        relative = torch.cat([table[:, :2], torch.ones_like(seconds)], dim=1) / seconds
        scale = relative.norm(dim=0).clamp(min=1e-300)
        found, _ = optimize.nnls((relative / scale).numpy(), [1.0] * len(seconds))
        constants = torch.as_tensor(found) / scale
        flop, byte, step = constants.tolist()
        return Device(flop, byte, step, tuple((relative @ constants - 1).tolist()))

    def seconds(self, flops: float, bytes: float, steps: int = 1) -> float:
        """Predicted seconds of so many steps with these FLOPs and bytes moved in all."""
        return self.flop * flops + self.byte * bytes + self.step * steps


def cost_model(
    model: nn.Module,
    example_inputs: Example,
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    sizes: Mapping[str, tuple[int, int] | None] | None = None,
    calls: Mapping[str, Example] | None = None,
) -> CostModel:
    """Capture a model at several sizes and solve what it costs.

    The sizes are `batch`, what the latents have of `tokens`, `frames`, `height` and `width`, and `text`, the
    second dimension of a three-dimensional constant input; further texts are named like their argument.
    Which inputs grow with a size is tried: those that have it as a dimension, first all and then fewer. Where
    the model does something of its own at the example's size, such as reading a position table that others
    compute, the captures start from twice that size.

    Expressions are exact where the model is a polynomial in its sizes. Rounding within the model, such as
    padding to a multiple, is refused if a captured size is no such multiple, and not seen if all are.

    Args:
        model: an nn.Module in eval mode, transformed or not.
        example_inputs: arguments of one call, as a mapping of keywords or a tuple of positions.
        timestep: the name of forward's timestep argument, if it is not found.
        latents: those of the latents, as for `transform`.
        sizes: by symbol, the two further sizes to capture at (one alone, one with all the others), by
            default twice and three times the example's (twice again where three times is refused); None
            leaves the symbol fixed.
        calls: by symbol, a call like the example in which that size alone differs, where trying does not
            find it; and under "all" one in which every size differs, needed where a call changes more than
            sizes of tensors.

    Raises:
        CaptureError: the model cannot be captured with the example.
        CostError: a size or call is unknown, or the sizes do not change together.
    """
    engine = Engine(original(model), Options(Plan(1), names=Names.of(timestep, latents)))
    found = vary(engine, example_inputs, sizes, calls)
    return CostModel(found.captures, found.fixed, found.base)


def _number(budget: Budget, tokens: Any) -> Any:
    count = sympy.Float(budget.count) if isinstance(budget.count, float) else sympy.Integer(budget.count)
    return among(tokens, count, sympy.Integer(budget.multiple))


def _budgets(schedule: Schedule, index: int, tokens: Mapping[str, Any]) -> list[Key]:
    """The distinct budgets of a phase."""
    actions = schedule.phases[index].actions
    keys = (_key(a.budget, tokens[history.site]) for history, a in actions if a.budget is not None)
    return list(dict.fromkeys(keys))


def _key(budget: Budget, tokens: Any) -> Key:
    return replace(budget, blend=None), tokens


def _least_tokens(wanted: Iterable[Key], sizes: Mapping[str, int]) -> int:
    """The fewest tokens that a budget is taken of at some sizes."""
    at = {symbol(name): size for name, size in sizes.items()}
    return min((int(sympy.sympify(tokens).subs(at)) for _, tokens in wanted), default=0)


def _budget_sizes(
    tokens: Sequence[int], names: Mapping[Key, str]
) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """Numbers of tokens for each capture, and for further ones of the base that change one budget each."""
    if not names:
        return [{} for _ in tokens], []
    least = 1 if min(tokens) < 4 else 2
    if min(tokens) < least + 1:
        raise CostError(f"a token budget of {min(tokens)} tokens cannot be varied; choose a larger example")
    base = dict.fromkeys(names.values(), least)
    # where all sizes change so do the budgets, that products of both are told from sums
    last = {name: min(least + 2 + i, tokens[-1]) for i, name in enumerate(base)}
    return [base] * (len(tokens) - 1) + [last], [{**base, name: least + 1} for name in base]


def _sized(
    capture: SizedProgram,
    schedule: Schedule,
    index: int,
    tokens: Mapping[str, Any],
    names: Mapping[Key, str],
    counts: Mapping[str, int],
) -> Sized:
    """A phase's graph at a capture's sizes, its budgets replaced by numbers of tokens."""

    def counted(history: History, action: Action) -> Action:
        if action.budget is None:
            return action
        count = counts[names[_key(action.budget, tokens[history.site])]]
        return replace(action, budget=Budget(count, 1, action.budget.blend))

    phase = schedule.phases[index]
    actions = tuple((history, counted(history, action)) for history, action in phase.actions)
    phases = (*schedule.phases[:index], replace(phase, actions=actions), *schedule.phases[index + 1 :])
    step = capture.program.phase(replace(schedule, phases=phases), index).step
    return Sized({**capture.sizes, **counts}, step)


def _peak(schedule: Schedule, entries: Mapping[History, Any]) -> Any:
    """The most bytes held at any time, like `Schedule.peak` of numbers."""
    moments, before = [sympy.S.Zero], sympy.S.Zero
    for index, step in enumerate(schedule.steps):
        stored = sympy.Add(*(entries[name] for name in schedule.stores[step.phase]))
        moments.append(sympy.expand(before + stored))
        before = schedule.held(index, entries)
    return sympy.Max(*set(moments))
