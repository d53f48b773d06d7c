"""One site's row, step by step: what it computes, reads and must keep."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphcache.analysis.bases import coefficients
from graphcache.ir.errors import PlanError
from graphcache.ir.history import OUTPUT, History
from graphcache.ir.letter import Letter
from graphcache.ir.plan import COMPUTE, REUSE, Plan, Row
from graphcache.ir.schedule import Action, Budget, Measure, Memory, Selection


@dataclass
class Track:
    """One site's row while it is simulated: its actions, what they read, what must be kept.

    `blocks` are those that it is of; a range and the output `surround` the sites of theirs.
    A `packed` history has entries that hold the difference to the one before, which is read no more then.
    `copy` is the track of the value that tokens are written into, where forecasts read the raw ones.
    """

    history: History
    row: Row
    blocks: range
    surround: bool = False
    packed: bool = False
    actions: list[Action] = field(default_factory=list)
    weights: list[tuple[float, ...]] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    last_read: dict[int, int] = field(default_factory=dict)
    copy: "Track | None" = None
    selections: dict[int, Selection] = field(default_factory=dict)

    @property
    def site(self) -> str:
        return self.history.site

    @property
    def is_patched(self) -> bool:
        """Whether the copy is newer than the newest computed value."""
        return self.copy is not None and self.copy.computed[:1] > self.computed[:1]

    def keep(self, step: int) -> int:
        """Entries still to be read after `step`, or by another branch's call at it."""
        return sum(1 for c, read in self.last_read.items() if c <= step < read)

    def read(self, step: int, count: int) -> None:
        """Note that a step reads the newest entries."""
        for computed in self.computed[:count]:
            self.last_read[computed] = step

    def record(self, action: Action, weights: tuple[float, ...]) -> None:
        """Note what happens at the next step."""
        self.actions.append(action)
        self.weights.append(weights)


def simulate(
    tracks: list[Track], steps: range, runs: Collection[int], letters: dict[str, Letter], count: int
) -> list[Track]:
    """Walk the steps; at those that the branch does not run nothing is computed and nothing ages."""
    for step in steps:
        if step not in runs:
            for track in tracks:
                track.record(Action("hold"), ())
            continue
        symbols = {track.site: _symbol(track, step, letters, steps.start) for track in tracks}
        held = _held_by(tracks, step, letters, symbols)
        for track in tracks:
            _advance(track, step, symbols[track.site], letters, count, held.get(track.site))
    return tracks


def select(track: Track, steps: range, plan: Plan, shared: bool) -> None:
    """What is chosen where the site is computed whole, for the token budgets up to the next such step."""
    letters = {letter.symbol: letter for letter in plan.letters}
    whole = [i for i, action in enumerate(track.actions) if action.kind in ("compute", "correct")]
    for first, following in zip(whole, [*whole[1:], len(steps)], strict=True):
        budgets = [i for i in range(first + 1, following) if track.actions[i].kind == "tokens"]
        if not budgets:
            continue
        chosen = tuple((steps[i], letters[track.row.actions[steps[i]]]) for i in budgets)
        halves = shared and all(letter.option("halves") == "shared" for _, letter in chosen)
        measures = {Measure.of(letter, halves) for _, letter in chosen}
        if len(measures) > 1:
            raise PlanError(
                f"site {track.site}, steps {steps[first]} to {steps[following - 1]}: token letters by "
                "different scores; between two computed steps a row has one"
            )
        track.selections[steps[first]] = Selection(track.history, chosen, following - first, plan.grid)
        if chosen[0][1].is_measured:
            track.actions[first] = replace(track.actions[first], measure=measures.pop())


def remembered(memory: Memory, tracks: Sequence[Track], steps: range) -> Track:
    """An operand of attention: whole where a site that reads it computes, else the chosen tokens' part."""
    by_name = {track.site: track for track in tracks if track.history.is_value}
    owner = by_name[memory.sites[0]]
    track = Track(memory.history, owner.row, owner.blocks)
    for i, step in enumerate(steps):
        kinds = {by_name[name].actions[i].kind if name in by_name else "compute" for name in memory.readers}
        if not kinds.isdisjoint(("compute", "correct")):
            track.record(Action("compute"), ())
            track.computed.insert(0, step)
        elif "tokens" in kinds:
            track.read(step, 1)
            track.record(Action("tokens", 1), ())
        else:
            track.record(Action("hold"), ())
    return track


def _symbol(track: Track, step: int, letters: dict[str, Letter], start: int) -> str:
    """A site's action. What has no value yet computes, and so does, where a generation begins late, what
    lists more values than there are.
    """
    symbol = track.row.actions[step]
    letter, listed = letters.get(symbol), track.row.listed(step)
    known = len(track.computed)
    if letter is not None and letter.is_compute:
        known += 1
    return COMPUTE if not track.computed or (start and len(listed or ()) > known) else symbol


def _held_by(
    tracks: Sequence[Track], step: int, letters: dict[str, Letter], symbols: Mapping[str, str]
) -> dict[str, str]:
    """Sites that neither compute nor age at a step, and the reused site around them."""

    def is_skipped(track: Track) -> bool:
        symbol = symbols[track.site]
        return symbol == REUSE or (symbol in letters and letters[symbol].is_forecast)

    held: dict[str, str] = {}
    for outer in (track for track in tracks if track.surround):
        if outer.site in held or not is_skipped(outer):
            continue
        for track in tracks:
            if track is outer or track.site in held or track.site == OUTPUT:
                continue
            if outer.site == OUTPUT or set(track.blocks) <= set(outer.blocks):
                held[track.site] = outer.site
            elif set(track.blocks) & set(outer.blocks) and is_skipped(track):
                raise PlanError(
                    f"step {step}: {outer.site} and {track.site} overlap and are both taken from the cache; "
                    "let one of them compute there"
                )
    return held


def _advance(
    track: Track, step: int, symbol: str, letters: dict[str, Letter], steps: int, held: str | None
) -> None:
    letter = letters.get(symbol)
    if held is not None:
        track.record(Action("hold"), ())
        return
    if symbol == COMPUTE:
        track.record(Action("compute"), ())
        track.computed.insert(0, step)
    elif letter is None:
        _newest(track).read(step, 1)
        track.record(Action("reuse", 1, patched=track.is_patched), ())
    elif letter.is_tokens:
        _budgeted(track, step, letter)
    else:
        _weighted(track, step, letter, steps)


def _weighted(track: Track, step: int, letter: Letter, steps: int) -> None:
    symbol = letter.symbol
    weights = coefficients(
        letter,
        step,
        (step, *track.computed) if letter.is_compute else tuple(track.computed),
        steps=steps,
        first_forecast=track.row.actions.index(symbol),
        listed=track.row.listed(step),
    )
    if letter.is_compute:
        track.read(step, 1)
        track.record(Action("correct", 1), weights)
        track.computed.insert(0, step)
    elif letter.is_packed:
        track.read(step, 1)
        if weights[1]:
            # the newest entry's difference was taken when it was computed
            newest, before = track.computed[:2]
            track.last_read[before] = max(track.last_read.get(before, newest), newest)
        track.record(Action("forecast", 1), (-weights[1],))
    else:
        # a step that lists fewer coefficients than its letter may reads no more values than those
        track.read(step, len(track.row.listed(step) or weights))
        track.record(Action("forecast", len(weights)), weights)


def _budgeted(track: Track, step: int, letter: Letter) -> None:
    """Some tokens are computed and written into the newest value, or a copy that no forecast reads."""
    patches = track.copy is not None and not track.is_patched
    action = Action("tokens", 1, budget=Budget.of(letter), patches=patches, patched=track.is_patched)
    _newest(track).read(step, 1)
    if patches and track.copy is not None:
        track.copy.computed.insert(0, step)
    track.record(action, ())


def _newest(track: Track) -> Track:
    """Where the newest value is: in the history, or in the copy that tokens were written into."""
    return track.copy if track.copy is not None and track.is_patched else track
