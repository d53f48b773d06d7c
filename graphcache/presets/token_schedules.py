"""ToCa's published schedules (arXiv 2410.05317 and its code): full steps, and tokens between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby

import torch

from graphcache.analysis.budgets import Budgets, assign
from graphcache.ir.errors import PlanError
from graphcache.ir.letter import Letter, Option
from graphcache.ir.plan import Plan, Row
from graphcache.ir.selector import Selector

TimeFactor = Callable[[float], float]


@dataclass(frozen=True)
class BranchKind:
    """A kind of branch that computes tokens: its rows, its factor, and which of all blocks are its layers.

    `first` and `count` are the layers' places among the `of` blocks that give depths.
    """

    role: str
    factor: float
    count: int
    first: int = 0
    of: int = 0
    tokens: int = 256


@dataclass(frozen=True)
class Published:
    """A model's constants.

    A partial step computes the fraction fresh · layer(l) · step(s/T) · factor of a part's tokens, at least
    none and at most all. Steps s count from 0, or, `falling`, down to it.
    """

    steps: int
    fresh: float
    layer: TimeFactor
    step: TimeFactor
    parts: tuple[BranchKind, ...]
    period: Callable[[int, int, int], int]
    interval: int
    reused: tuple[str, ...]
    score: Mapping[str, Option] = field(default_factory=dict)
    falling: bool = False
    warmup: int = 1
    sticky: bool = True
    groups: int = 3
    slower: Mapping[str, int] = field(default_factory=dict)


def _dit_period(interval: int, step: int, steps: int) -> int:
    if 0.2 * steps <= step < 0.4 * steps:
        return 2
    return _rounded(interval, 1.4, -0.8, step, steps)


def _pixart_period(interval: int, step: int, steps: int) -> int:
    return _rounded(interval, 0.8, 0.4, step, steps)


def _constant_period(interval: int, step: int, steps: int) -> int:
    return interval


def _rounded(interval: int, at: float, slope: float, step: int, steps: int) -> int:
    """interval / (at + slope · step / steps), half to even, in single precision as released."""
    at_, slope_, share = (torch.tensor(v, dtype=torch.float32) for v in (at, slope, step / steps))
    return round(float(interval / (at_ + slope_ * share)))


def _sloped(weight: float, layers: int = 28) -> TimeFactor:
    return lambda layer: 1 + weight - 2 * weight * layer / (layers - 1)


_INFLUENCE: dict[str, Option] = {"by": "influence", "staleness": 0.25, "spread": 2, "bonus": 0.6}
_ENTROPY: Mapping[str, Option] = {"by": "entropy", "staleness": 0.25, "spread": 4, "bonus": 0.4}


def _dit(steps: int, interval: int, layer: TimeFactor, step: TimeFactor) -> Published:
    parts = (BranchKind("mlp", 2.5, 28),)
    score = _INFLUENCE
    return Published(steps, 0.07, layer, step, parts, _dit_period, interval, ("self",), score, falling=True)


PUBLISHED: Mapping[str, Published] = {
    "dit": _dit(50, 3, _sloped(-0.2), lambda share: 3 - 4 * share),
    "dit-ddpm": _dit(250, 4, _sloped(0.8), lambda share: 1.4 - 0.8 * share),
    "pixart-alpha": Published(
        20,
        0.3,
        _sloped(0.6),
        lambda s: 1.9 - 1.8 * s,
        (BranchKind("mlp", 1.6, 28), BranchKind("cross", 0.6, 28)),
        _pixart_period,
        3,
        ("self",),
        _ENTROPY,
        groups=2,
    ),
    "open-sora-1.2": Published(
        30,
        0.1,
        lambda layer: 1.0,
        lambda s: 1.0,
        (BranchKind("mlp", 1.495, 28, tokens=23_850),),
        _constant_period,
        3,
        ("self", "cross"),
        {"by": "norm", "staleness": 0.25},
        warmup=3,
        sticky=False,
        groups=1,
        slower={"cross": 2},
    ),
    "flux": Published(
        50,
        0.1,
        lambda layer: 1.5 - layer / 27,
        lambda s: 1.0,
        (
            BranchKind("mlp", 0.4, 19, 0, 57, 4096),
            BranchKind("parallel.mlp", 1.6, 38, 19, 57, 4608),
        ),
        _constant_period,
        4,
        ("joint", "parallel.attention"),
        _INFLUENCE | {"spread": 0, "bonus": 0.0},
        warmup=3,
        sticky=False,
        groups=1,
    ),
}


@dataclass(frozen=True)
class Timetable:
    """What each block does at each step: `full[step]` of block 0, `others[step]` of all other blocks."""

    full: tuple[bool, ...]
    others: tuple[bool, ...]


def timetable(model: Published, steps: int, interval: int, quirk: bool = False) -> Timetable:
    """The steps that compute everything.

    A sticky period is taken anew at each of them and holds from the next step on; with the `quirk` of the
    released code, that re-decides in every block, from the next block on.
    """
    full, others, period = [], [], interval
    for index in range(steps):
        step = steps - 1 - index if model.falling else index
        first = index < model.warmup
        full.append(first or _is_due(model, step, period))
        after = model.period(interval, step, steps) if full[-1] and model.sticky else period
        others.append(first or _is_due(model, step, after if quirk else period))
        period = after
    return Timetable(tuple(full), tuple(others))


def _is_due(model: Published, step: int, period: int) -> bool:
    # without a sticky period the warm-up's last step begins the first cycle
    return (step if model.sticky else step - model.warmup + 1) % period == 0


def raw_budget(model: Published, part: BranchKind, layer: int, index: int, steps: int, fresh: float) -> int:
    """The tokens that the published rule computes."""
    step = steps - 1 - index if model.falling else index
    share = fresh * model.layer(layer) * model.step(step / steps) * part.factor
    return int(min(max(share, 0.0), 1.0) * part.tokens)


@cache
def budgets(name: str, part: BranchKind, steps: int, interval: int, fresh: float, multiple: int) -> Budgets:
    """The sizes of a part at the partial steps, in their order."""
    model = PUBLISHED[name]
    partial = [i for i, full in enumerate(timetable(model, steps, interval).full) if not full]
    raw = [[raw_budget(model, part, layer, i, steps, fresh) for layer in range(part.count)] for i in partial]
    return assign(raw, part.tokens, model.groups, multiple)


def aged(score: Mapping[str, Option], interval: int) -> dict[str, Option]:
    """The score of tokens whose age counts in the published N, which is not always the steps of the cycle."""
    return {**score, **({"period": interval} if score["by"] in ("influence", "entropy", "norm") else {})}


def published_plan(
    name: str,
    steps: int | None,
    interval: int | None,
    fresh: float | None,
    by: str | None,
    queries: float | None,
    multiple: int,
    quirk: bool,
) -> Plan:
    """The plan of a published model, for any number of steps."""
    model = PUBLISHED.get(name)
    if model is None:
        known = ", ".join(PUBLISHED)
        raise PlanError(f"toca: unknown model {name!r}; models are {known}, or a number of steps")
    steps = model.steps if steps is None else steps
    interval = model.interval if interval is None else interval
    fresh = model.fresh if fresh is None else fresh
    score: dict[str, Option] = aged(model.score if by is None else {"by": by}, interval)
    if queries is not None:
        score["queries"] = queries
    times = timetable(model, steps, interval, quirk)
    letters: dict[tuple[str, float], Letter] = {}
    rows = []
    for role in model.reused:
        rows += _reused_rows(f"@{role}", times, model, model.slower.get(role, 1))
    for part in model.parts:
        rows += _part_rows(name, part, times, steps, interval, fresh, multiple, score, letters)
    return Plan(steps, tuple(letters.values()), tuple(rows))


def _reused_rows(site: str, times: Timetable, model: Published, slower: int) -> list[Row]:
    """Computed at full steps, or at every few of them, and reused between."""
    rows = []
    for first, full in ((False, times.others), (True, times.full)):
        if first and times.full == times.others:
            continue
        actions, count = "", 0
        for index, is_full in enumerate(full):
            count += is_full and index >= model.warmup
            due = is_full and (index < model.warmup or count % slower == 0)
            actions += "#" if due else "."
        bounds = f"[0..{0.5 / 27!r}]" if first else ""
        rows.append(Row(Selector.parse(f"{site}{bounds}"), actions))
    return rows


def _part_rows(
    name: str,
    part: BranchKind,
    times: Timetable,
    steps: int,
    interval: int,
    fresh: float,
    multiple: int,
    score: Mapping[str, Option],
    letters: dict[tuple[str, float], Letter],
) -> list[Row]:
    sizes = budgets(name, part, steps, interval, fresh, multiple).sizes
    partial = [i for i, full in enumerate(times.full) if not full]
    rows = []
    for layer in range(part.count):
        full = times.full if layer == 0 else times.others
        actions, later = ["#" if is_full else "." for is_full in full], dict(zip(partial, sizes, strict=True))
        known: tuple[int, ...] = ()
        for index in range(steps):
            known = later.get(index, known)
            if not full[index] and known:
                actions[index] = _symbol(known[layer], part, multiple, score, letters)
        rows.append("".join(actions))
    return _grouped(rows, part)


def _symbol(
    size: int,
    part: BranchKind,
    multiple: int,
    score: Mapping[str, Option],
    letters: dict[tuple[str, float], Letter],
) -> str:
    if size == 0:
        return "."
    key = part.role, size / part.tokens
    if key not in letters:
        options = {"count": key[1], **score, "multiple": multiple}
        letters[key] = Letter("abcdefgh"[len(letters)], "tokens", tuple(options.items()))
    return letters[key].symbol


def _grouped(actions: Sequence[str], part: BranchKind) -> list[Row]:
    """One row for each stretch of layers that do the same, by depth, so that any number of blocks fits."""
    of = part.of or part.count
    rows, first = [], 0
    for text, layers in groupby(actions):
        last = first + len(list(layers)) - 1
        low, high = ((part.first + layer) / (of - 1) for layer in (first - 0.5, last + 0.5))
        bounds = f"[{max(low, 0.0)!r}..{min(high, 1.0)!r}]"
        whole = first == 0 and last == part.count - 1 and not part.of
        rows.append(Row(Selector.parse(f"@{part.role}{'' if whole else bounds}"), text))
        first = last + 1
    return rows
