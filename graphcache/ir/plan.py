"""The plan: how each site is obtained at each step, as data."""

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import msgspec

from graphcache.ir import plantext
from graphcache.ir.errors import PlanError
from graphcache.ir.letter import MAX_STEPS, Letter
from graphcache.ir.plantext import is_word
from graphcache.ir.promise import Promise
from graphcache.ir.selector import Selector

COMPUTE, REUSE = "#", "."
_HEADER = ("steps", "preset", "conditional", "grid", "graph", "scheduler")
MAX_PERIOD = 16

Value = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Row:
    """The actions of the sites that a selector matches, one character a step, counted from 0.

    `coefficients` holds (step, values newest first) of every step whose letter lists them.
    """

    selector: Selector
    actions: str
    coefficients: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        listed = ((step, tuple(map(float, values))) for step, values in self.coefficients)
        object.__setattr__(self, "coefficients", tuple(sorted(listed)))

    def listed(self, step: int) -> tuple[float, ...] | None:
        """The coefficients listed for a step, newest history entry first."""
        return dict(self.coefficients).get(step)


@dataclass(frozen=True, slots=True)
class Preset:
    """The call that made a plan, part of its text and of equality."""

    name: str
    arguments: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        if self.name == "none" or not is_word(self.name):
            raise PlanError(f"{self.name!r} cannot name a preset")
        for name, value in self.arguments:
            if not name.isidentifier() or name in _HEADER:
                raise PlanError(f"preset {self.name}: {name!r} cannot name an argument")
            again = plantext.parse_value(plantext.print_value(value))
            if (
                again != value
                or type(again) is not type(value)
                or (isinstance(value, str) and not is_word(value))
            ):
                raise PlanError(f"preset {self.name}: {name}={value!r} is no finite number, bool or word")
        if len(dict(self.arguments)) < len(self.arguments):
            raise PlanError(f"preset {self.name} has an argument twice")


@dataclass(frozen=True, slots=True)
class Plan:
    """Sites × steps grid of actions. Every Plan that exists is legal; PlanError says why one is not.

    `conditional`, "first" or "last", says which half of a doubled batch is the conditional branch's;
    diffusers' pipelines put it last. It is what goes on when guidance ends within a generation and the batch
    halves; without it the histories start empty there. `grid` holds the frames, height and width of the
    tokens, for models that return predictions as packed tokens. `graph` is the fingerprint of the only model
    that the plan is for, and `scheduler` the class of the only scheduler, where a pipeline has one; None is
    any. `promise` says how near its results came to the untouched model's; a plan that is changed has none,
    whoever changed it, in Python or in its text.
    """

    steps: int
    letters: tuple[Letter, ...] = ()
    rows: tuple[Row, ...] = ()
    preset: Preset | None = None
    conditional: str | None = None
    grid: tuple[int, int, int] | None = None
    graph: str | None = None
    scheduler: str | None = None
    promise: Promise | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "letters", tuple(self.letters))
        object.__setattr__(self, "rows", tuple(self.rows))
        check_steps(self.steps)
        if self.conditional not in (None, "first", "last"):
            raise PlanError(
                f"conditional={self.conditional}: the conditional half of a doubled batch is first or last"
            )
        for name in ("graph", "scheduler"):
            if getattr(self, name) is not None and not is_word(getattr(self, name)):
                raise PlanError(f"{name}={getattr(self, name)!r} is no name")
        symbols = [letter.symbol for letter in self.letters]
        for symbol in symbols:
            if symbols.count(symbol) > 1:
                raise PlanError(f"letter {symbol!r} is defined twice")
        for row in self.rows:
            _check_row(row, self)
        _check_guidance(self)
        if self.promise is not None and self.promise.plan != self._digest():
            object.__setattr__(self, "promise", None)

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Reads a plan's text; `;` starts a comment, blank lines and indentation mean nothing."""
        return cls._of(plantext.read_text(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads a file of text or JSON, told apart by suffix and content; no code in it ever runs."""
        try:
            return cls._of(plantext.load(path))
        except PlanError as error:
            raise PlanError(f"{os.fspath(path)}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON to a path that ends in `.json`, else text; the file is replaced whole or not at all."""
        plantext.save(self._document(), path)

    def __str__(self) -> str:
        return plantext.write_text(self._document())

    def promising(self, promise: Promise) -> "Plan":
        """The plan with what was measured of it."""
        return replace(self, promise=replace(promise, plan=self._digest()))

    def letter(self, symbol: str) -> Letter | None:
        """The definition of a letter; None of the built-in `#` and `.`."""
        return next((letter for letter in self.letters if letter.symbol == symbol), None)

    @property
    def is_guided(self) -> bool:
        """Whether the plan has steps at which only the conditional branch of guidance runs."""
        rows = [row for row in self.rows if row.selector.is_guidance]
        return bool(rows) and set(rows[-1].actions) != {COMPUTE}

    @property
    def splits_parallel(self) -> bool:
        """Whether fused branches are taken apart into attention and MLP."""
        return any(row.selector.splits for row in self.rows)

    def resample(self, steps: int) -> "Plan":
        """The grid for another number of steps: periods kept, thresholds scaled, legal again.

        The result carries no preset: `graphcache.presets.resample` evaluates a preset's plan anew.
        Listed coefficients hold for their own steps: the line through the two newest values takes the place
        of those that forecast, and plain computing of those that correct.
        """
        if steps == self.steps:
            return self
        check_steps(steps)
        corrected = {letter.symbol: COMPUTE for letter in self.letters if letter.is_compute}
        plain = str.maketrans(corrected)
        rows = tuple(Row(row.selector, _resampled(row.actions.translate(plain), steps)) for row in self.rows)
        letters = tuple(
            _scaled(letter, steps / self.steps) for letter in self.letters if not letter.is_compute
        )
        return replace(self, steps=steps, letters=letters, rows=rows, preset=None)

    @property
    def lists_coefficients(self) -> bool:
        """Whether some coefficients are the plan's own, made for its number of steps."""
        return any(row.coefficients for row in self.rows)

    @classmethod
    def _of(cls, document: plantext.PlanDocument) -> "Plan":
        letters = (Letter(item.symbol, item.kind, tuple(item.options.items())) for item in document.letters)
        rows = []
        for item in document.rows:
            listed = tuple((line.step, tuple(line.values)) for line in item.coefficients)
            rows.append(Row(Selector.parse(item.site), item.actions, listed))
        preset = document.preset
        call = None if preset is None else Preset(preset.name, tuple(preset.arguments.items()))
        grid = None if document.grid is None else _checked_grid(document.grid)
        promise = document.promise
        return cls(
            document.steps,
            tuple(letters),
            tuple(rows),
            call,
            document.conditional,
            grid,
            document.graph,
            document.scheduler,
            None if promise is None else Promise(**msgspec.structs.asdict(promise)),
        )

    def _document(self) -> plantext.PlanDocument:
        letters = [plantext.LetterLine(item.symbol, item.kind, dict(item.options)) for item in self.letters]
        rows = []
        for row in self.rows:
            listed = [plantext.CoefficientLine(step, list(values)) for step, values in row.coefficients]
            rows.append(plantext.RowLine(str(row.selector), row.actions, listed))
        call = self.preset
        preset = None if call is None else plantext.PresetLine(call.name, dict(call.arguments))
        grid = None if self.grid is None else list(self.grid)
        return plantext.PlanDocument(
            plantext.VERSION,
            self.steps,
            preset,
            self.conditional,
            self.graph,
            self.scheduler,
            grid,
            letters,
            rows,
            None if self.promise is None else plantext.PromiseLine(**asdict(self.promise)),
        )

    def _digest(self) -> str:
        """A word that tells plans apart by everything but what they promise."""
        text = plantext.write_text(msgspec.structs.replace(self._document(), promise=None))
        return "p" + hashlib.sha256(text.encode()).hexdigest()[:15]


def check_steps(steps: int) -> None:
    """Raises PlanError unless a plan can have this many steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise PlanError(f"steps={steps}: a plan has 1 to {MAX_STEPS} steps")


def _checked_grid(grid: object) -> tuple[int, int, int]:
    sizes = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(sizes) != 3 or not all(isinstance(n, int) and n is not True and 0 < n < 10**6 for n in sizes):
        raise PlanError(f"grid={grid}: write frames, height and width of the tokens, as in grid=1x64x64")
    return sizes[0], sizes[1], sizes[2]


def _check_guidance(plan: Plan) -> None:
    used = set("".join(row.actions for row in plan.rows if row.selector.is_guidance))
    divisors = {letter.option("divisor") for letter in plan.letters if letter.symbol in used}
    if len(divisors) > 1:
        raise PlanError("row guidance: its letters split the difference alike; give them one divisor")


def _check_row(row: Row, plan: Plan) -> None:
    if len(row.actions) != plan.steps:
        raise PlanError(f"row {row.selector} has {len(row.actions)} actions, the plan {plan.steps} steps")
    letters = {letter.symbol: letter for letter in plan.letters}
    listed = dict(row.coefficients)
    if len(listed) < len(row.coefficients):
        raise PlanError(f"row {row.selector} lists the coefficients of a step twice")
    computed = 0
    used = [letter for symbol, letter in letters.items() if symbol in row.actions]
    for step, action in enumerate(row.actions):
        where = f"row {row.selector}, step {step}"
        letter = letters.get(action)
        if letter is None and action not in (COMPUTE, REUSE):
            known = ", ".join([COMPUTE, REUSE, *letters])
            raise PlanError(f"{where}: unknown letter {action!r}; letters of this plan: {known}")
        if letter is not None and row.selector.is_guidance is not letter.is_frequency:
            raise PlanError(
                f"{where}: guidance is computed, reused or forecast by its frequencies, and it alone; "
                f"{action!r} is {letter.kind}"
            )
        if letter is not None and letter.is_tokens and not row.selector.is_branches:
            raise PlanError(
                f"{where}: {action!r} is a token budget, which branches have and {row.selector} has not"
            )
        if action != COMPUTE and computed == 0:
            raise PlanError(f"{where}: {action!r} comes before any compute; put '#' there or earlier")
        _check_packed(where, letter, used)
        computed += action == COMPUTE or (letter is not None and letter.is_compute)
        _check_listed(where, letter, listed.pop(step, None), computed)
    if listed:
        raise PlanError(f"row {row.selector} lists coefficients of step {min(listed)}, beyond the last step")


def _check_packed(where: str, letter: Letter | None, used: list[Letter]) -> None:
    if letter is not None and letter.is_packed and not all(other.is_packed for other in used):
        raise PlanError(
            f"{where}: {letter.symbol!r} is linear8, whose cache the row's other letters cannot read"
        )


def _check_listed(where: str, letter: Letter | None, values: tuple[float, ...] | None, computed: int) -> None:
    if letter is None or not letter.is_listed:
        if values is not None:
            raise PlanError(f"{where}: coefficients are listed, but its action takes none")
        return
    if values is None:
        raise PlanError(f"{where}: {letter.symbol!r} is {letter.kind}; list its coefficients under the row")
    if not all(map(math.isfinite, values)):
        raise PlanError(f"{where}: coefficients must be finite")
    most = min(letter.order + 1, computed)
    if not 1 <= len(values) <= most:
        raise PlanError(
            f"{where}: {len(values)} coefficients are listed; {letter.symbol!r} takes 1 to "
            f"{letter.order + 1}, and {computed} values are computed by then"
        )


def _scaled(letter: Letter, ratio: float) -> Letter:
    """A ramp stretched with the steps, so that its end points stay; turning points rounded half up."""
    if letter.is_listed:
        return Letter(letter.symbol, "newton", (("order", min(1, letter.order)),))
    options = []
    for name, value in letter.options:
        if name in ("begin", "over"):
            value = float(value) * ratio
        elif name in ("low_until", "high_from"):
            value = min(int(int(value) * ratio + 0.5), MAX_STEPS)
        options.append((name, value))
    return replace(letter, options=tuple(options))


def _resampled(actions: str, steps: int) -> str:
    """Segments of one period each: their bounds scale, rounded half up, and their pattern repeats."""
    scaled, position = "", 0
    for pattern, length in _segments(actions):
        position += length
        missing = (2 * position * steps + len(actions)) // (2 * len(actions)) - len(scaled)
        scaled += (pattern * (missing // len(pattern) + 1))[:missing]
    return scaled if scaled[0] == COMPUTE else COMPUTE + scaled[1:]


def _segments(actions: str) -> Iterable[tuple[str, int]]:
    """Cuts a row from the left into the longest periodic stretches; what is not periodic stands alone."""
    start = 0
    while start < len(actions):
        length, period = 1, 1
        for candidate in range(1, MAX_PERIOD + 1):
            end = start + candidate
            while end < len(actions) and actions[end] == actions[end - candidate]:
                end += 1
            if end - start >= 2 * candidate and end - start > length:
                length, period = end - start, candidate
        yield actions[start : start + period], length
        start += length
