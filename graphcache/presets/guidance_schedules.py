"""FasterCache's schedules (arXiv 2410.19355): the released code's constants, and the paper's own rule."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from graphcache.ir.errors import PlanError
from graphcache.ir.letter import Letter, Option
from graphcache.ir.plan import Plan, Row, check_steps
from graphcache.ir.selector import Selector

Depths = tuple[float, float]


@dataclass(frozen=True)
class Turns:
    """Which steps are reused: from `first` on those that are multiples of `period`, or those that are not."""

    first: int
    period: int
    on_multiples: bool = False

    def reuse(self, count: int) -> bool:
        return count >= self.first and (count % self.period == 0) is self.on_multiples


@dataclass(frozen=True)
class GuidanceSchedule:
    """When attention is reused and when the unconditional branch is, for a number of steps.

    Steps are counted from `base`. `weight` are the options of the extrapolation of attention; None reuses the
    newest value. `factors` are those of the difference's bands: low, the last step that has it, high, and its
    first step. With `computes_at_refresh` attention is computed wherever both branches run once one-branch
    steps have begun; the last step always runs both if `completes`.
    """

    steps: int
    features: Turns
    guidance: Turns
    factors: tuple[float, int, float, int]
    weight: Mapping[str, Option] | None
    weighting: str = "released"
    divisor: int = 5
    base: int = 1
    plain_context: bool = False
    computes_at_refresh: bool = False
    completes: bool = False
    conditional: str = "last"

    def plan(self, guided: bool, depths: Depths, compact: bool) -> Plan:
        """The rows of attention, and that of guidance if the model has any."""
        letters, rows = [], []
        attention = "".join(map(self._attention, range(self.steps)))
        for role in ("self", "joint"):
            rows.append(Row(_selector(role, depths), attention))
        if self.weight is not None and "l" in attention:
            letters.append(Letter("l", "linear8" if compact else "linear", tuple(self.weight.items())))
            if self.plain_context:
                rows.append(Row(_selector("joint.context", depths), attention.replace("l", ".")))
        if guided:
            actions = "".join("#g"[self._alone(step)] for step in range(self.steps))
            rows.append(Row(Selector.parse("guidance"), actions))
            letters.append(self._bands())
        return Plan(self.steps, tuple(letters), tuple(rows), conditional=self.conditional if guided else None)

    def _alone(self, step: int) -> bool:
        """Whether only the conditional branch runs."""
        last = self.completes and step == self.steps - 1
        return step > 0 and not last and self.guidance.reuse(step + self.base)

    def _attention(self, step: int) -> str:
        count = step + self.base
        refreshes = self.computes_at_refresh and count >= self.guidance.first and not self._alone(step)
        if step == 0 or refreshes or not self.features.reuse(count):
            return "#"
        return "." if self.weight is None else "l"

    def _bands(self) -> Letter:
        low, until, high, begin = self.factors
        options: dict[str, Option] = {"low": low, "low_until": until + 1 - self.base}
        options |= {"high": high, "high_from": begin + 1 - self.base}
        return Letter(
            "g", "frequency", (*options.items(), ("weighting", self.weighting), ("divisor", self.divisor))
        )


def generic_schedule(steps: int, start: Fraction, interval: int) -> GuidanceSchedule:
    """The paper's rule: every second attention and all but every `interval`-th unconditional branch.

    Reuse begins after the fraction `start` of the steps. The paper does not say at which step the
    weight goes over from the low to the high band; here that is half of the steps.
    """
    check_steps(steps)
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 2:
        raise PlanError(f"interval={interval}: must be a whole number of at least 2")
    first = _half_up(steps * start) + 1
    return GuidanceSchedule(
        steps,
        Turns(first, 2, on_multiples=True),
        Turns(first, interval),
        (1.2, steps // 2, 1.2, steps // 2 + 1),
        {"weight": "paper"},
        weighting="paper",
        computes_at_refresh=True,
    )


def published_schedule(model: str, steps: int | None) -> GuidanceSchedule:
    """The released code's constants for a model, scaled to a number of steps.

    Raises:
        PlanError: the model is unknown, or the steps are no number of steps.
    """
    if model not in _RELEASED:
        raise PlanError(
            f"fastercache knows no model {model!r}; its models are generic, {', '.join(_RELEASED)}"
        )
    published = _RELEASED[model]
    if steps is None or steps == published.steps:
        return published
    check_steps(steps)
    return _Scale(published, steps).schedule()


@dataclass(frozen=True)
class _Scale:
    """Step constants for other steps: in proportion, rounded half up; the last step stays the last."""

    published: GuidanceSchedule
    steps: int
    ratio: Fraction = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", Fraction(self.steps, self.published.steps))

    def schedule(self) -> GuidanceSchedule:
        given = self.published
        low, until, high, begin = given.factors
        weight = given.weight
        if weight is not None and "over" in weight:
            start, end = self.at(int(weight["begin"])), self.at(int(weight["begin"]) + int(weight["over"]))
            weight = {**weight, "begin": start, "over": max(end - start, 1)}
        return replace(
            given,
            steps=self.steps,
            features=self.turns(given.features),
            guidance=self.turns(given.guidance),
            factors=(low, self.at(until), high, self.at(begin)),
            weight=weight,
        )

    def turns(self, turns: Turns) -> Turns:
        return replace(turns, first=self.at(turns.first))

    def at(self, step: int) -> int:
        return self.steps if step == self.published.steps else _half_up(step * self.ratio)


def _half_up(value: Fraction) -> int:
    return int(value + Fraction(1, 2))


def _selector(role: str, depths: Depths) -> Selector:
    low, high = depths
    return Selector.parse(
        f"@{role}" if (low, high) == (0, 1) else f"@{role}[{float(low)!r}..{float(high)!r}]"
    )


def _constant(weight: float) -> dict[str, Option]:
    return {"weight": weight}


def _ramp(begin: int, over: int, gain: float, floor: float = 0.0) -> dict[str, Option]:
    return {"weight": "ramp", "begin": begin, "over": over, "gain": gain, "floor": floor}


_RELEASED: dict[str, GuidanceSchedule] = {
    "open-sora-1.2": GuidanceSchedule(
        30,
        Turns(8, 2, on_multiples=True),
        Turns(12, 5),
        (1.15, 25, 1.15, 20),
        _ramp(7, 20, 0.9),
        conditional="first",
    ),
    "latte": GuidanceSchedule(
        50,
        Turns(16, 2, on_multiples=True),
        Turns(18, 5),
        (1.1, 44, 1.1, 45),
        _constant(0.5),
        computes_at_refresh=True,
    ),
    "open-sora-plan-1.1": GuidanceSchedule(
        150, Turns(45, 3), Turns(40, 6), (1.1, 130, 1.2, 131), _constant(0.3)
    ),
    "cogvideox": GuidanceSchedule(
        50,
        Turns(18, 3),
        Turns(18, 5),
        (1.1, 40, 1.1, 30),
        _constant(0.3),
        computes_at_refresh=True,
    ),
    "vchitect-2.0": GuidanceSchedule(
        100, Turns(31, 2, on_multiples=True), Turns(31, 5), (1.05, 79, 1.1, 61), None, divisor=200
    ),
    "mochi": GuidanceSchedule(
        64,
        Turns(20, 2, on_multiples=True),
        Turns(22, 5),
        (1.15, 50, 1.25, 30),
        # counted from 1, as every ramp
        _ramp(1, 63, 1.0, floor=0.5),
        base=0,
        plain_context=True,
        completes=True,
    ),
}
