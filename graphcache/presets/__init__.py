"""Published schedules as plans. A preset is a function of the number of steps and knows no model."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction

from graphcache.ir.errors import PlanError
from graphcache.ir.letter import Letter, Option
from graphcache.ir.plan import Plan, Preset, Row, Value, check_steps
from graphcache.ir.selector import Selector
from graphcache.presets.guidance_schedules import generic_schedule, published_schedule
from graphcache.presets.token_schedules import aged, published_plan


def compute(steps: int) -> Plan:
    """No row: every site computes at every step."""
    return Plan(steps, preset=Preset("compute"))


def fora(steps: int, interval: int = 3) -> Plan:
    """FORA (arXiv 2407.01425): every branch computes at every `interval`-th step and is reused between."""
    _check(steps, interval=interval)
    row = Row(Selector.parse("*"), _periodic(steps, interval))
    return Plan(steps, rows=(row,), preset=Preset("fora", (("interval", interval),)))


def taylorseer(steps: int, interval: int = 3, order: int = 2, warmup: int = 1, lite: bool = False) -> Plan:
    """TaylorSeer (arXiv 2503.06923): computed like FORA after `warmup` full steps, forecast between.

    `lite` forecasts what all blocks together add to the stream instead of every branch.
    """
    _check(steps, interval=interval, warmup=warmup)
    if not isinstance(lite, bool):
        raise PlanError(f"lite={lite}: must be true or false")
    site = "range(0.0..1.0)" if lite else "*"
    row = Row(Selector.parse(site), _periodic(steps, interval, "t", warmup))
    arguments = (("interval", interval), ("order", order), ("warmup", warmup), ("lite", lite))
    letter = Letter("t", "taylorseer", (("order", order),))
    return Plan(steps, (letter,), (row,), Preset("taylorseer", arguments))


def hicache(steps: int, interval: int = 3, order: int = 2, sigma: float = 0.5, warmup: int = 1) -> Plan:
    """HiCache (arXiv 2508.16984): TaylorSeer's schedule with a basis of scaled Hermite polynomials."""
    _check(steps, interval=interval, warmup=warmup)
    letter = Letter("h", "hermite", (("order", order), ("sigma", sigma)))
    row = Row(Selector.parse("*"), _periodic(steps, interval, "h", warmup))
    arguments = (("interval", interval), ("order", order), ("sigma", sigma), ("warmup", warmup))
    return Plan(steps, (letter,), (row,), Preset("hicache", arguments))


def pab(
    steps: int,
    spatial: int = 2,
    temporal: int = 4,
    cross: int = 6,
    start: float = 0.1,
    stop: float = 0.8,
) -> Plan:
    """PAB (arXiv 2408.12588): attention is reused by kind in the middle of the generation, MLPs compute.

    Step s reuses when start·steps <= s < stop·steps and s is no multiple of its kind's interval.
    """
    intervals = {"spatial": spatial, "temporal": temporal, "cross": cross}
    _check(steps, **intervals)
    first, last = _fraction("start", start) * steps, _fraction("stop", stop) * steps

    def row(site: str, interval: int) -> Row:
        reused = (first <= step < last and step % interval != 0 for step in range(steps))
        return Row(Selector.parse(site), "".join(".#"[not reuse] for reuse in reused))

    rows = (
        row("@self", spatial),
        row("@joint", spatial),
        row("@self.temporal", temporal),
        row("@cross", cross),
    )
    arguments = (*intervals.items(), ("start", start), ("stop", stop))
    return Plan(steps, rows=rows, preset=Preset("pab", arguments))


def delta_dit(steps: int, interval: int = 2, gate: float = 0.5, blocks: float = 0.5) -> Plan:
    """Δ-DiT (arXiv 2406.01125): what a range of blocks adds is reused, rear blocks first, front ones later.

    The rear range is cached before gate·steps, the front range from there on; each holds the fraction
    `blocks` of the depth, so above 0.5 the ranges overlap. Gate and fraction depend on the model: the
    paper tunes both.
    """
    _check(steps, interval=interval)
    change = -(-_fraction("gate", gate) * steps // 1)
    share = _fraction("blocks", blocks)
    if not 0 < share < 1:
        raise PlanError(f"blocks={blocks}: must be above 0 and below 1, so that the ranges differ")
    early, late = int(change), steps - int(change)
    rear = Row(Selector.parse(f"range({float(1 - share)!r}..1.0)"), _periodic(early, interval) + "#" * late)
    front = Row(Selector.parse(f"range(0.0..{float(share)!r})"), "#" * early + _periodic(late, interval))
    arguments = (("interval", interval), ("gate", gate), ("blocks", blocks))
    return Plan(steps, rows=(rear, front), preset=Preset("delta_dit", arguments))


def fastercache(
    model: str | int = "generic",
    steps: int | None = None,
    *,
    start: float = 1 / 3,
    interval: int = 5,
    guidance: bool = True,
    shallowest: float = 0.0,
    deepest: float = 1.0,
    compact: bool = False,
    conditional: str | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Plan:
    """FasterCache (arXiv 2410.19355): attention is extrapolated, one branch of guidance made from the other.

    Args:
        model: whose constants of the released code to take: "open-sora-1.2", "latte", "open-sora-plan-1.1",
            "cogvideox", "vchitect-2.0" or "mochi"; "generic" takes the paper's defaults. A number stands for
            `steps` and the generic plan.
        steps: of the generation, by default those that the constants were published for. Step constants scale
            with others, rounded half up; periods stay.
        start: generic only, the fraction of the steps before anything is reused.
        interval: generic only, the steps from one evaluation of both branches to the next.
        guidance: False leaves both branches of every step alone, for guidance-distilled models.
        shallowest, deepest: the depths, 0 the first block and 1 the last, between which attention is reused.
        compact: keep attention's newest value in bfloat16, its difference to the last in 8 bits.
        conditional: the conditional branch's half of a doubled batch, where it is not the published model's.
        grid: frames, height and width of the tokens, for models that return packed tokens.
    """
    if isinstance(model, int):
        steps, model = model, "generic"
    arguments: dict[str, Value]
    if model == "generic":
        if steps is None:
            raise PlanError("fastercache(steps): say how many steps the generation has")
        schedule = generic_schedule(steps, _fraction("start", start), interval)
        arguments = {"start": start, "interval": interval}
    else:
        schedule = published_schedule(model, steps)
        steps, arguments = schedule.steps, {"model": model}
    arguments |= {"guidance": guidance, "shallowest": shallowest, "deepest": deepest, "compact": compact}
    made = schedule.plan(guidance, (shallowest, deepest), compact)
    half = conditional or schedule.conditional
    return replace(made, preset=Preset("fastercache", tuple(arguments.items())), conditional=half, grid=grid)


def toca(
    model: str | int = "generic",
    steps: int | None = None,
    ratio: float = 0.7,
    *,
    interval: int | None = None,
    fresh: float | None = None,
    by: str | None = None,
    queries: float | None = None,
    multiple: int = 16,
    released_quirk: bool = False,
) -> Plan:
    """ToCa (arXiv 2410.05317): between steps that compute everything, MLPs compute some tokens only.

    Args:
        model: whose constants to take: "dit" (DDIM), "dit-ddpm", "pixart-alpha", "open-sora-1.2" or "flux";
            "generic" goes by roles alone: attention is reused, every MLP computes the same share of tokens,
            chosen at random. A number stands for `steps` and the generic plan, what follows it for `ratio`.
        steps: of the generation, by default those that the constants were published for.
        ratio: generic only, the paper's R: the share of tokens that partial steps take from the cache.
        interval: steps from one full step to the next (published models vary it over the generation).
        fresh: published models only, the share of tokens that is scaled by layer, step and kind.
        by: the score of tokens, where it is not the published model's.
        queries: the part of the queries whose attention scores tokens by influence, by default all.
        multiple: of which the numbers of tokens are.
        released_quirk: published models only: the released code decides anew in every block of a full step,
            after its first block has changed the period, so that some full steps are full there only.

    The published numbers of tokens differ in every layer and step. They are replaced by two sizes a kind over
    few contiguous groups of steps, with the same work to 3 % (`graphcache.analysis.budgets`).
    """
    if isinstance(model, int):
        steps, ratio, model = model, ratio if steps is None else steps, "generic"
    _check(1 if steps is None else steps, multiple=multiple, interval=1 if interval is None else interval)
    arguments: dict[str, Value | None]
    if model == "generic":
        if steps is None:
            raise PlanError("toca(steps): say how many steps the generation has")
        if released_quirk or fresh is not None or queries is not None:
            raise PlanError("toca(steps): fresh, queries and released_quirk are of published models")
        share = float(1 - _fraction("ratio", ratio))
        plan = _token_plan(steps, interval or 3, {"by": by or "random"}, share, multiple)
        arguments = {"ratio": ratio, "interval": interval or 3}
    else:
        plan = published_plan(model, steps, interval, fresh, by, queries, multiple, released_quirk)
        arguments = {"model": model, "interval": interval, "fresh": fresh, "released_quirk": released_quirk}
    arguments |= {"by": by, "queries": queries, "multiple": multiple}
    given = tuple((name, value) for name, value in arguments.items() if value is not None)
    return replace(plan, preset=Preset("toca", given))


def duca(steps: int, interval: int = 3, ratio: float = 0.7, by: str = "random", multiple: int = 16) -> Plan:
    """DuCa (arXiv 2412.18911): of ToCa's partial steps every other one, first, skips all blocks.

    There the change that the blocks made to the stream at the step before is added again.
    """
    _check(steps, interval=interval, multiple=multiple)
    plan = _token_plan(steps, interval, {"by": by}, float(1 - _fraction("ratio", ratio)), multiple)
    skipped = "".join("." if step % interval % 2 else "#" for step in range(steps))
    rows = (*plan.rows, Row(Selector.parse("range(0.0..1.0)"), skipped))
    arguments = (("interval", interval), ("ratio", ratio), ("by", by), ("multiple", multiple))
    return replace(plan, rows=rows, preset=Preset("duca", arguments))


def clusca(steps: int, interval: int = 3, clusters: int = 16, blend: float = 0.005) -> Plan:
    """ClusCa: an MLP computes one token of each cluster of alike ones; the others follow it by a share."""
    _check(steps, interval=interval, clusters=clusters)
    plan = _token_plan(steps, interval, {"by": "cluster", "blend": blend}, clusters, 1)
    arguments = (("interval", interval), ("clusters", clusters), ("blend", blend))
    return replace(plan, preset=Preset("clusca", arguments))


def _token_plan(
    steps: int, interval: int, score: Mapping[str, Option], count: int | float, multiple: int
) -> Plan:
    """Full steps at an interval; between them attention is reused and MLPs compute some tokens."""
    options = {"count": count, **aged(score, interval), "multiple": multiple}
    letter = Letter("a", "tokens", tuple(options.items()))
    reused, partial = ("self", "cross", "joint", "parallel.attention"), ("mlp", "parallel.mlp")
    rows = [(role, ".") for role in reused] + [(role, "a") for role in partial]
    made = (Row(Selector.parse(f"@{role}"), _periodic(steps, interval, act)) for role, act in rows)
    return Plan(steps, (letter,), tuple(made))


_PRESETS: dict[str, Callable[..., Plan]] = {
    "compute": compute,
    "fora": fora,
    "taylorseer": taylorseer,
    "hicache": hicache,
    "pab": pab,
    "delta_dit": delta_dit,
    "fastercache": fastercache,
    "toca": toca,
    "duca": duca,
    "clusca": clusca,
}


def names() -> tuple[str, ...]:
    """The presets that a plan's header may name."""
    return tuple(_PRESETS)


def evaluate(preset: Preset, steps: int) -> Plan:
    """The plan of a preset's call for this number of steps."""
    function = _PRESETS.get(preset.name)
    if function is None:
        raise PlanError(f"unknown preset {preset.name!r}; presets are {', '.join(_PRESETS)}")
    arguments: dict[str, Value] = dict(preset.arguments)
    accepted = [name for name in inspect.signature(function).parameters if name != "steps"]
    for name in arguments:
        if name not in accepted:
            takes = ", ".join(accepted) or "no arguments"
            raise PlanError(f"preset {preset.name} takes {takes}, not {name!r}")
    return function(steps=steps, **arguments)


def resample(plan: Plan, steps: int) -> Plan:
    """The plan for another number of steps: a known preset is evaluated anew, any other grid is resampled.

    Rows changed by hand under a preset's header would be lost by evaluating it; that is an error.
    """
    if steps == plan.steps:
        return plan
    if plan.preset is None or plan.preset.name not in _PRESETS:
        return plan.resample(steps)
    if _under_header(plan, evaluate(plan.preset, plan.steps)) != replace(plan, promise=None):
        raise PlanError(
            f"the rows are not those of preset {plan.preset.name} at {plan.steps} steps and would be lost; "
            f"write preset=none to resample them"
        )
    return _under_header(plan, evaluate(plan.preset, steps))


def _under_header(given: Plan, plan: Plan) -> Plan:
    """A plan with what another's header says of the model's calls."""
    return replace(
        plan,
        conditional=given.conditional,
        grid=given.grid,
        graph=given.graph,
        scheduler=given.scheduler,
    )


def _periodic(steps: int, interval: int, between: str = ".", warmup: int = 1) -> str:
    """`warmup` computed steps, then one of every `interval`, counted from the last of them."""
    return "".join(
        "#" if step < warmup or (step - warmup + 1) % interval == 0 else between for step in range(steps)
    )


def _check(steps: int, **intervals: object) -> None:
    check_steps(steps)
    for name, value in intervals.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"{name}={value}: must be a whole number of at least 1")


def _fraction(name: str, value: object) -> Fraction:
    """A fraction as its decimals say, so that 0.07 of 100 steps is 7."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise PlanError(f"{name}={value}: must be a fraction from 0 to 1")
    return Fraction(repr(value))
