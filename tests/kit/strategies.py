"""Random legal plans."""

from collections.abc import Sequence

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from graphcache.ir.letter import Letter
from graphcache.ir.plan import Plan, Row
from graphcache.ir.promise import Promise
from graphcache.ir.selector import Selector
from seeding import Run

SELECTORS = ("@self", "@mlp", "*", "output", "range(0..1)")
QUICK = settings(
    max_examples=10 if Run.every else 3,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
_MILD = st.floats(-2, 2).map(lambda value: round(value, 3))


@st.composite
def letters(draw: st.DrawFn, tokens: bool = False) -> tuple[Letter, ...]:
    """A few definitions with mild options, among them forecasts, listed ones and corrected computes."""
    orders = st.integers(0, 3)
    weight = draw(st.sampled_from(["exact", "paper", "ramp"]) | _MILD)
    ramp = (("begin", 1.0), ("over", draw(st.sampled_from([4.0, 10.0]))), ("gain", 0.9), ("floor", 0.25))
    known = [
        Letter("n", "newton", (("order", draw(orders)),)),
        Letter("t", "taylorseer", (("order", draw(orders)),)),
        Letter("h", "hermite", (("order", draw(orders)), ("sigma", draw(st.sampled_from([0.25, 0.5, 1.0]))))),
        Letter("l", "linear", (("weight", weight), *(ramp if weight == "ramp" else ()))),
        Letter("f", "fitted", (("order", draw(orders)),)),
        Letter("u", "tuned", (("order", draw(orders)),)),
        Letter("c", "tuned compute"),
        Letter("C", "fitted compute"),
    ]
    factor, turn = st.sampled_from([0.5, 1.0, 1.1]), st.integers(0, 8)
    bands = {"low": draw(factor), "low_until": draw(turn), "high": draw(factor), "high_from": draw(turn)}
    weighting = ("weighting", draw(st.sampled_from(["paper", "released"])))
    known.append(Letter("g", "frequency", (*bands.items(), weighting)))
    if tokens:
        budget = st.integers(0, 64) | st.sampled_from([0.25, 0.5])
        options = (("by", "random"), ("multiple", draw(st.integers(1, 3))))
        known += [Letter(symbol, "tokens", (("count", draw(budget)), *options)) for symbol in "ab"]
    return tuple(draw(st.lists(st.sampled_from(known), unique=True, max_size=len(known))))


@st.composite
def rows(
    draw: st.DrawFn,
    selector: str,
    steps: int,
    defined: Sequence[Letter],
    values: st.SearchStrategy[float] = _MILD,
) -> Row:
    """A legal row: it computes first, and lists no more coefficients than values computed by then."""
    site = Selector.parse(selector)
    usable = {
        item.symbol: item
        for item in defined
        if item.is_frequency is site.is_guidance and (site.is_branches or not item.is_tokens)
    }
    actions, listed, computed = "#", [], 1
    for step in range(1, steps):
        action = draw(st.sampled_from(["#", ".", *usable]))
        letter = usable.get(action)
        computed += action == "#" or (letter is not None and letter.is_compute)
        if letter is not None and letter.is_listed:
            count = min(letter.order + 1, computed)
            listed.append((step, tuple(draw(st.lists(values, min_size=1, max_size=count)))))
        actions += action
    return Row(site, actions, tuple(listed))


@st.composite
def promises(draw: st.DrawFn) -> Promise:
    """A promise, as yet of no plan."""
    mean, below, span = draw(st.floats(-20, 150)), draw(st.floats(0, 30)), draw(st.floats(0.5, 255))
    return Promise(
        mean, mean - below, span, draw(st.integers(1, 64)), draw(st.sampled_from(["latent", "sampler"]))
    )


@st.composite
def plans(
    draw: st.DrawFn,
    selectors: Sequence[str] = SELECTORS,
    steps: tuple[int, int] = (1, 12),
    tokens: bool = False,
    values: st.SearchStrategy[float] = _MILD,
) -> Plan:
    """A legal plan with one to four rows over the given selectors and a number of steps within bounds.

    Some promise something.
    """
    count = draw(st.integers(*steps))
    defined = draw(letters(tokens))
    sites = draw(st.lists(st.sampled_from(list(selectors)), min_size=1, max_size=4))
    plan = Plan(count, defined, tuple(draw(rows(site, count, defined, values)) for site in sites))
    promise = draw(st.none() | promises())
    return plan if promise is None else plan.promising(promise)
