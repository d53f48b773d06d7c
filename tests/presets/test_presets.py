import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache import presets
from graphcache.ir.errors import PlanError
from graphcache.ir.plan import Plan, Preset

STEPS = st.integers(1, 120)


def actions(plan: Plan) -> dict[str, str]:
    return {str(row.selector): row.actions for row in plan.rows}


def call(name: str, steps: int) -> Plan:
    return presets.evaluate(Preset(name), steps)


@pytest.mark.parametrize("name", presets.names())
@given(steps=STEPS)
def test_every_preset_is_legal_prints_and_evaluates_to_itself(name: str, steps: int) -> None:
    plan = call(name, steps)
    assert plan.steps == steps
    assert plan.preset is not None
    assert plan.preset.name == name
    assert Plan.parse(str(plan)) == plan
    assert presets.evaluate(plan.preset, steps) == plan
    assert all(row.actions[0] == "#" for row in plan.rows)


@pytest.mark.parametrize("name", presets.names())
@given(steps=STEPS, other=STEPS)
def test_a_preset_is_evaluated_anew_for_other_steps(name: str, steps: int, other: int) -> None:
    assert presets.resample(call(name, steps), other) == call(name, other)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (presets.compute(8), "plan steps=8 preset=compute"),
        (presets.fora(8), "plan steps=8 preset=fora interval=3\n*  #..#..#."),
        (
            presets.taylorseer(9, interval=4, order=1, warmup=2),
            "plan steps=9 preset=taylorseer interval=4 order=1 warmup=2 lite=false\n"
            "t = taylorseer order=1\n*  ##ttt#ttt",
        ),
        (
            presets.taylorseer(8, lite=True),
            "plan steps=8 preset=taylorseer interval=3 order=2 warmup=1 lite=true\n"
            "t = taylorseer order=2\nrange(0.0..1.0)  #tt#tt#t",
        ),
        (
            presets.hicache(8, sigma=0.7),
            "plan steps=8 preset=hicache interval=3 order=2 sigma=0.7 warmup=1\n"
            "h = hermite order=2 sigma=0.7\n*  #hh#hh#h",
        ),
        (
            presets.pab(20),
            "plan steps=20 preset=pab spatial=2 temporal=4 cross=6 start=0.1 stop=0.8\n"
            "@self           ###.#.#.#.#.#.#.####\n"
            "@joint          ###.#.#.#.#.#.#.####\n"
            "@self.temporal  ##..#...#...#...####\n"
            "@cross          ##....#.....#...####",
        ),
        (
            presets.delta_dit(12, interval=3, gate=0.6, blocks=0.25),
            "plan steps=12 preset=delta_dit interval=3 gate=0.6 blocks=0.25\n"
            "range(0.75..1.0)  #..#..#.####\n"
            "range(0.0..0.25)  #########..#",
        ),
    ],
    ids=lambda value: value.preset.name if isinstance(value, Plan) else "",
)
def test_plans_in_full(plan: Plan, text: str) -> None:
    assert str(plan) == text


@given(STEPS, st.integers(1, 6), st.floats(0, 1), st.floats(0, 1))
def test_pab_reuses_within_the_middle_range_only(steps: int, cross: int, start: float, stop: float) -> None:
    row = actions(presets.pab(steps, cross=cross, start=start, stop=stop))["@cross"]
    for step, action in enumerate(row):
        if action == ".":
            assert step % cross != 0
            assert start * steps - 1e-9 <= step < stop * steps + 1e-9


def test_pab_counts_in_decimals() -> None:
    assert 0.07 * 100 > 7
    assert actions(presets.pab(100, start=0.07))["@self"][7] == "."


@given(STEPS, st.integers(1, 5), st.floats(0, 1), st.floats(0.05, 0.95))
def test_delta_dit_never_reuses_both_ranges_at_once(
    steps: int, interval: int, gate: float, blocks: float
) -> None:
    rear, front = actions(presets.delta_dit(steps, interval, gate, blocks)).values()
    for step, pair in enumerate(zip(rear, front, strict=True)):
        assert pair != (".", ".")
        assert rear[step] == "#" or step < gate * steps
        assert front[step] == "#" or step >= gate * steps


@given(st.integers(2, 6), st.integers(2, 10), st.integers(1, 80))
def test_grids_with_an_interval_resample_to_that_preset(interval: int, cycles: int, steps: int) -> None:
    before = interval * cycles
    for preset in (presets.fora, lambda n, k: presets.taylorseer(n, k, warmup=1)):
        assert preset(before, interval).resample(steps).rows == preset(steps, interval).rows


def test_the_same_steps_are_the_same_plan() -> None:
    plan = Plan.parse("plan steps=3 preset=fora interval=2\n@self #..")
    assert presets.resample(plan, 3) is plan


def test_other_plans_are_resampled() -> None:
    plan = Plan.parse("plan steps=6 preset=homemade level=2\n@self #.#.#.")
    assert str(presets.resample(plan, 4)) == "plan steps=4 preset=none\n@self  #.#."


def test_rows_changed_under_a_header_are_not_lost() -> None:
    plan = Plan.parse("plan steps=3 preset=fora interval=2\n@self #..")
    with pytest.raises(PlanError, match=r"not those of preset fora at 3 steps.*write preset=none"):
        presets.resample(plan, 4)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("preset=magic", "unknown preset 'magic'; presets are compute, fora, taylorseer"),
        ("preset=compute interval=2", "preset compute takes no arguments, not 'interval'"),
        ("preset=fora period=2", "preset fora takes interval, not 'period'"),
        ("preset=fora interval=0", "interval=0: must be a whole number of at least 1"),
        ("preset=fora interval=2.0", "interval=2.0: must be a whole number"),
        ("preset=fora interval=true", "interval=True: must be a whole number"),
        ("preset=taylorseer warmup=0", "warmup=0: must be a whole number of at least 1"),
        ("preset=taylorseer order=many", "order=many is not a whole number"),
        ("preset=taylorseer lite=1", "lite=1: must be true or false"),
        ("preset=hicache sigma=-1", "sigma=-1 is not a number above 0"),
        ("preset=pab cross=x", "cross=x: must be a whole number"),
        ("preset=pab start=1.5", "start=1.5: must be a fraction from 0 to 1"),
        ("preset=delta_dit gate=late", "gate=late: must be a fraction"),
        ("preset=delta_dit blocks=0", "blocks=0: must be above 0 and below 1"),
        ("preset=delta_dit blocks=1.0", "blocks=1.0: must be above 0 and below 1"),
    ],
)
def test_refusals(header: str, message: str) -> None:
    preset = Plan.parse(f"plan steps=4 {header}").preset
    assert preset is not None
    with pytest.raises(PlanError, match=message):
        presets.evaluate(preset, 4)


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("steps", [0, -1, 10**18])
def test_steps_out_of_bounds(name: str, steps: int) -> None:
    with pytest.raises(PlanError, match="a plan has 1 to 100000 steps"):
        call(name, steps)
