"""The letters that a plan's header defines: kinds of action and their options."""

from collections.abc import Callable
from dataclasses import dataclass

from graphcache.ir.errors import PlanError
from graphcache.ir.plantext import is_number

MAX_ORDER = 8
MAX_STEPS = 100_000

Option = int | float | str

_REQUIRED = object()
_ORDER: dict[str, object] = {"order": _REQUIRED}
_OPTIONS: dict[str, dict[str, object]] = {
    "newton": _ORDER,
    "taylorseer": _ORDER,
    "hermite": {**_ORDER, "sigma": 0.5},
    "linear": {"weight": "exact"},
    "linear8": {"weight": "exact"},
    "fitted": _ORDER,
    "tuned": _ORDER,
    "fitted compute": {},
    "tuned compute": {},
    "tokens": {"count": _REQUIRED, "by": _REQUIRED},
    "frequency": {
        "low": 1.0,
        "low_until": 0,
        "high": 1.0,
        "high_from": 0,
        "weighting": "paper",
        "divisor": 5,
    },
}
_RANKED: dict[str, object] = {"staleness": 0.25, "period": 0, "spread": 0, "bonus": 0.5}
_SCORES: dict[str, dict[str, object]] = {
    "random": {"seed": 0},
    "stratified": {"seed": 0},
    "influence": {**_RANKED, "queries": 1.0},
    "entropy": _RANKED,
    "norm": _RANKED,
    "cluster": {"blend": 0.005, "seed": 0},
}
_BUDGET: dict[str, object] = {"multiple": 16, "halves": "shared"}
_RAMP: dict[str, object] = {"begin": _REQUIRED, "over": _REQUIRED, "gain": 1.0, "floor": 0.0}
_FORECASTS = ("newton", "taylorseer", "hermite", "linear", "linear8", "fitted", "tuned")
_CORRECTED = ("fitted compute", "tuned compute")


def _is_order(value: object) -> bool:
    return is_number(value) and isinstance(value, int) and 0 <= value <= MAX_ORDER


def _is_budget(value: object) -> bool:
    return is_number(value) and (0 <= value <= 10**9 if isinstance(value, int) else 0 < value <= 1)


def _is_positive(value: object) -> bool:
    return is_number(value) and value > 0


def _is_step(value: object) -> bool:
    return is_number(value) and isinstance(value, int) and 0 <= value <= MAX_STEPS


def _is_divisor(value: object) -> bool:
    return is_number(value) and isinstance(value, int) and value > 2


def _is_fraction(value: object) -> bool:
    return is_number(value) and 0 < value <= 1


def _is_share(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_multiple(value: object) -> bool:
    return is_number(value) and isinstance(value, int) and 1 <= value <= 4096


def _is_seed(value: object) -> bool:
    return is_number(value) and isinstance(value, int) and 0 <= value < 2**31


def _is_spread(value: object) -> bool:
    return is_number(value) and isinstance(value, int) and 0 <= value <= 1024


def _is_score(value: object) -> bool:
    return value in _SCORES


def _is_weighting(value: object) -> bool:
    return value in ("paper", "released")


def _is_weight(value: object) -> bool:
    return is_number(value) or value in ("exact", "paper", "ramp")


_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "order": (_is_order, f"a whole number from 0 to {MAX_ORDER}"),
    "sigma": (_is_positive, "a number above 0"),
    "weight": (_is_weight, "a number, exact, paper or ramp"),
    "begin": (is_number, "a finite number"),
    "over": (_is_positive, "a number above 0"),
    "gain": (is_number, "a finite number"),
    "floor": (is_number, "a finite number"),
    "count": (_is_budget, "a number of tokens or a fraction of them up to 1.0"),
    "by": (_is_score, f"the name of a score: {', '.join(_SCORES)}"),
    "multiple": (_is_multiple, "a whole number of tokens, at least 1"),
    "halves": (lambda value: value in ("shared", "own"), "shared or own"),
    "staleness": (is_number, "a finite number"),
    "period": (_is_step, "a whole number of steps, 0 for those of the cycle"),
    "spread": (_is_spread, "the side of a block of tokens, 0 for none"),
    "bonus": (is_number, "a finite number"),
    "queries": (_is_fraction, "a fraction of the queries, above 0 and at most 1"),
    "blend": (_is_share, "a number from 0 to 1"),
    "seed": (_is_seed, "a whole number below 2^31"),
    "low": (is_number, "a finite number"),
    "low_until": (_is_step, "a whole number of steps"),
    "high": (is_number, "a finite number"),
    "high_from": (_is_step, "a whole number of steps"),
    "weighting": (_is_weighting, "paper or released"),
    "divisor": (_is_divisor, "a whole number above 2"),
}
_WHOLE = ("order", "count", "low_until", "high_from", "divisor", "multiple", "period", "spread", "seed")


@dataclass(frozen=True, slots=True)
class Letter:
    """An action that a plan's header defines; options that have a default are filled in.

    Of `linear weight=ramp` the weight is max(floor, (c − begin) / over · gain) at the 1-based step c.
    `linear8` is `linear` from a smaller cache: the newest value in bfloat16, and its difference to the one
    before in 8 bits with a scale for each token. `frequency` is for the row `guidance`: at the 1-based step c
    the low band of the branches' difference is multiplied by `low` while c <= low_until, and its high band by
    `high` once c >= high_from. With `weighting=released` the factors of all such steps since the difference
    was measured multiply. The low band is a disc of radius min(H, W) // divisor.

    `tokens` computes `count` of a branch's tokens, a number or a fraction of them, rounded to a `multiple`,
    and takes the others from the cache, where the computed ones then stand. They are chosen `by` a score,
    made where the branch was last computed whole:
    - `random`: each token once before any one twice; `stratified`: one from each of `count` stretches;
    - `influence`: the attention that a token receives (of a part of the `queries`), `entropy`: how evenly it
      attends to the text, `norm`: the size of its cached value; all normalised over the tokens. A token that
      was not computed for n steps gains `staleness`·n / `period`, by default the steps of the cycle; in each
      `spread`×`spread` block of the grid of tokens the best one's score grows by the share `bonus`;
    - `cluster`: the token next to the mean of each of `count` clusters; the others move the share `blend` of
      the way to their cluster's new value.
    With `halves=shared` both halves of a batch that are the same latents take the same tokens.
    """

    symbol: str
    kind: str
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        if len(self.symbol) != 1 or not self.symbol.isprintable() or self.symbol in " #.=;":
            raise PlanError(f"{self.symbol!r} cannot be a letter: use one printable character, not # . = ;")
        if self.kind not in _OPTIONS:
            kinds = ", ".join(_OPTIONS)
            raise PlanError(f"letter {self.symbol!r}: unknown kind {self.kind!r}; kinds are {kinds}")
        object.__setattr__(self, "options", self._complete(dict(self.options)))

    def _complete(self, given: dict[str, Option]) -> tuple[tuple[str, Option], ...]:
        known = _OPTIONS[self.kind]
        if given.get("weight") == "ramp" and self.is_linear:
            known = {**known, **_RAMP}
        if self.is_tokens:
            known = {**known, **_BUDGET, **_SCORES.get(str(given.get("by")), {})}
        for name in given:
            if name not in known:
                takes = ", ".join(known) or "no options"
                raise PlanError(f"letter {self.symbol!r}: {self.kind} takes {takes}, not {name!r}")
        options = []
        for name, default in known.items():
            value = given.get(name, default)
            if value is _REQUIRED:
                raise PlanError(f"letter {self.symbol!r}: {self.kind} needs {name}=")
            options.append((name, self._checked(name, value)))
        return tuple(options)

    def _checked(self, name: str, value: object) -> Option:
        check, expected = _CHECKS[name]
        if not check(value):
            raise PlanError(f"letter {self.symbol!r}: {name}={value} is not {expected}")
        assert isinstance(value, (int, float, str))
        if name in _WHOLE or isinstance(value, str):
            return value
        return float(value)

    def option(self, name: str) -> Option:
        return dict(self.options)[name]

    @property
    def order(self) -> int:
        """One less than the number of history entries that the letter reads."""
        if self.is_linear or self.is_compute:
            return 1
        return int(dict(self.options).get("order", 0))

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "linear8")

    @property
    def is_packed(self) -> bool:
        """Reads a cache of the newest value in bfloat16 and of its difference to the one before in 8 bits."""
        return self.kind == "linear8"

    @property
    def is_forecast(self) -> bool:
        return self.kind in _FORECASTS

    @property
    def is_compute(self) -> bool:
        """Computes, then takes a·new + b·previous; the history keeps the raw value."""
        return self.kind in _CORRECTED

    @property
    def is_tokens(self) -> bool:
        return self.kind == "tokens"

    @property
    def is_measured(self) -> bool:
        """Whether the tokens' score is computed from the step's values."""
        return self.is_tokens and self.option("by") in ("influence", "entropy", "norm")

    @property
    def is_frequency(self) -> bool:
        return self.kind == "frequency"

    @property
    def is_listed(self) -> bool:
        """Whether the coefficients of every use are listed at the row."""
        return self.kind in ("fitted", "tuned") or self.is_compute
