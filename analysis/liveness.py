"""From a plan's rows to phases: what each step loads, stores and drops."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from graphcache.analysis.frequency import factors
from graphcache.analysis.tracks import Track, remembered, select, simulate
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import Branch, block_count
from graphcache.ir.history import GUIDANCE, OUTPUT, PREDICTION, History, range_site
from graphcache.ir.letter import Letter
from graphcache.ir.plan import Plan, Row
from graphcache.ir.resolve import Resolution, resolve
from graphcache.ir.schedule import UNCORRECTED, Action, Guided, Memory, Phase, Role, Schedule, Step

_Column = tuple[Action, ...]


def lower(
    plan: Plan,
    branches: Sequence[Branch],
    rows: Resolution | None = None,
    start: int = 0,
    role: Role = "only",
    memories: Sequence[Memory] = (),
    shared: bool = False,
) -> Schedule:
    """Turn a plan into phases.

    Args:
        plan: the grid of actions.
        branches: the model's residual branches, in execution order.
        rows: the plan's, met with these branches.
        start: first step that will run; earlier ones are skipped, and what lacks history computes.
        role: which calls of guidance the schedule is for; without any, the row `guidance` means nothing.
        memories: operands that sites with token budgets need kept whole.
        shared: whether both halves of the batch are the same latents, so that they may share their tokens.

    Raises:
        PlanError: rows that match nothing, actions without the history they need, overlapping ranges.
    """
    blocks = block_count(branches)
    resolution = rows or resolve(plan, branches, blocks)
    _refuse_split_values(resolution, branches)
    letters = {letter.symbol: letter for letter in plan.letters}
    steps = range(start, plan.steps)
    guidance = None if role == "only" else _guidance(resolution.guidance, letters, steps)
    if guidance is not None and resolution.output is not None:
        raise PlanError("rows guidance and output exclude each other: the output is that of both branches")

    def simulated(runs: Collection[int]) -> list[Track]:
        tracks = _tracks(resolution, branches, blocks, letters)
        simulate(tracks, steps, runs, letters, plan.steps)
        for track in tracks:
            select(track, steps, plan, shared)
            if track.copy is not None:
                track.copy.actions = [Action("hold")] * len(steps)
                track.copy.weights = [()] * len(steps)
        tracks += [track.copy for track in tracks if track.copy is not None]
        return tracks + [remembered(memory, tracks, steps) for memory in memories]

    if guidance is None:
        return _assemble(simulated(steps), steps, memories=memories)
    tracks = [] if role == "uncond" else simulated(steps)
    if role != "cond":
        others = simulated([s for s in steps if guidance.actions[s - start].kind == "compute"])
        for track in others:
            _rename(track, role)
        tracks += others
    tracks.append(_prediction(guidance, steps) if role == "cond" else guidance)
    if role == "doubled" and memories:
        raise PlanError(
            f"site {memories[0].sites[0]}: attention on a token budget is not to be had in a doubled batch "
            "of which guidance drops a half; let it compute or reuse, or call the branches one by one"
        )
    return _assemble(tracks, steps, _guided(plan, letters, resolution, role), memories)


def _guidance(row: Row | None, letters: dict[str, Letter], steps: range) -> Track | None:
    """The branches' difference: measured at a step with both branches, read at those with one."""
    if row is None or set(row.actions) == {"#"}:
        return None
    split = any(symbol in letters for symbol in row.actions)
    track = Track(History(GUIDANCE), row, range(0))
    since: list[int] = []
    for step in steps:
        letter = letters.get(row.actions[step])
        if row.actions[step] == "#" or not track.computed:
            track.record(Action("compute"), ())
            track.computed.insert(0, step)
            since = []
            continue
        track.read(step, 1)
        weights = (1.0, 1.0) if split else (1.0,)
        if letter is not None:
            since.append(step)
            weights = factors(letter, step, since)
        track.record(Action("forecast", 1), weights)
    return track


def _prediction(guidance: Track, steps: range) -> Track:
    """The conditional branch's result, which the other call of the same step reads."""
    track = Track(History(PREDICTION), guidance.row, range(0))
    for step in steps:
        track.record(Action("compute"), ())
        track.computed.append(step)
        track.last_read[step] = step + 1
    return track


def _guided(plan: Plan, letters: dict[str, Letter], resolution: Resolution, role: Role) -> Guided:
    row = resolution.guidance
    used = (letters[symbol] for symbol in (row.actions if row else "") if symbol in letters)
    divisor = next((int(letter.option("divisor")) for letter in used), None)
    return Guided(plan.conditional if role == "doubled" else None, divisor, plan.grid)


def _refuse_split_values(resolution: Resolution, branches: Sequence[Branch]) -> None:
    """One value that is added to two streams is cached as one."""
    first: dict[str, Branch] = {}
    for branch in branches:
        other = first.setdefault(branch.value, branch)
        rows = [resolution.branches.get(b.name) for b in (branch, other)]
        actions = [(row.actions, row.coefficients) if row else None for row in rows]
        if actions[0] != actions[1]:
            raise PlanError(
                f"{other.name} and {branch.name} are one value added to two streams, and their rows differ; "
                "give them the same row"
            )


def _tracks(
    resolution: Resolution, branches: Sequence[Branch], blocks: int, letters: dict[str, Letter]
) -> list[Track]:
    """Sites that a row ever takes from the cache, outermost first."""
    tracks = []
    if resolution.output is not None:
        tracks.append(Track(History(OUTPUT), resolution.output, range(blocks), surround=True))
    for row, first, last in sorted(resolution.ranges, key=lambda item: item[1] - item[2]):
        history = History(range_site(first, last))
        tracks.append(Track(history, row, range(first, last + 1), surround=True))
    for branch in branches:
        row_ = resolution.branches.get(branch.name)
        if row_ is not None:
            tracks.append(Track(History(branch.name), row_, range(branch.block, branch.block + 1)))
    packed = {symbol for symbol, letter in letters.items() if letter.is_packed}
    for track in tracks:
        track.packed = not packed.isdisjoint(track.row.actions)
        used = [letters[symbol] for symbol in set(track.row.actions) if symbol in letters]
        if any(letter.is_tokens for letter in used) and any(
            letter.is_forecast or letter.is_compute for letter in used
        ):
            track.copy = Track(track.history.patched, track.row, track.blocks)
    return [track for track in tracks if set(track.row.actions) != {"#"}]


def _rename(track: Track, role: Role) -> None:
    """The unconditional half of a doubled batch has histories of its own."""
    if role != "doubled":
        return
    track.history = track.history.other_half
    track.selections = {step: replace(item, history=track.history) for step, item in track.selections.items()}


def _assemble(
    tracks: Sequence[Track], steps: range, guided: Guided | None = None, memories: Sequence[Memory] = ()
) -> Schedule:
    """Merge equal columns; a phase stores what any of its steps needs stored."""
    columns = _merged([tuple(track.actions[i] for track in tracks) for i in range(len(steps))])
    order = {column: i for i, column in enumerate(dict.fromkeys(columns))}
    members = defaultdict(list)
    for i, column in enumerate(columns):
        members[order[column]].append(i)
    phases, weights = [], {}
    for column, index in order.items():
        phase, groups = _phase(tracks, column, members[index], steps)
        doubled = guided is not None and guided.conditional is not None
        phases.append(replace(phase, half=doubled and phase.is_answered))
        for i in members[index]:
            weights[i] = tuple(tracks[t].weights[i] or UNCORRECTED for t in groups)
    known: dict[tuple[int, ...], Mapping[History, int]] = {}
    result = tuple(
        Step(
            order[columns[i]],
            weights[i],
            _kept(tracks, step, known),
            tuple(t.selections[step] for t in tracks if step in t.selections),
        )
        for i, step in enumerate(steps)
    )
    ranges = {t.site: t.blocks for t in tracks if t.surround and t.site != OUTPUT}
    bounds = tuple((name, blocks.start, blocks.stop - 1) for name, blocks in ranges.items())
    return Schedule(tuple(phases), result, bounds, guided, tuple(memories))


def _kept(
    tracks: Sequence[Track], step: int, known: dict[tuple[int, ...], Mapping[History, int]]
) -> Mapping[History, int]:
    """How many entries of each history are kept after a step: one object for all steps that keep the same."""
    counts = tuple([track.keep(step) for track in tracks])
    return known.setdefault(counts, dict(zip([track.history for track in tracks], counts, strict=True)))


def _merged(columns: list[_Column]) -> list[_Column]:
    """A column of one step does more than it must, where that spares a graph.

    It measures scores that nobody reads, or corrects by 1 and 0 what it computes.
    """

    def does_more(one: _Column, other: _Column) -> bool:
        return all(b in _included(a) for a, b in zip(one, other, strict=True))

    counts = Counter(columns)
    result = []
    for column in columns:
        wider = [other for other in counts if other != column and does_more(other, column)]
        result.append(wider[0] if wider and counts[column] == 1 else column)
    return result


def _included(action: Action) -> list[Action]:
    """What an action does besides measuring scores, or correcting."""
    whole = [action]
    if action.kind == "correct":
        whole.append(replace(action, kind="compute", reads=0))
    return [*whole, *(replace(some, measure=None) for some in whole)]


def _phase(
    tracks: Sequence[Track], column: _Column, members: Sequence[int], steps: range
) -> tuple[Phase, list[int]]:
    """The phase of a column, and for each coefficient group a track that has its weights."""
    groups: dict[tuple[tuple[float, ...], ...], int] = {}
    owners: list[int] = []
    actions = []
    for t, (track, action) in enumerate(zip(tracks, column, strict=True)):
        if action.kind in ("forecast", "correct"):
            rows = tuple(track.weights[i] or UNCORRECTED for i in members)
            action = replace(action, optional=any(not track.weights[i] for i in members))
            if rows not in groups:
                groups[rows] = len(groups)
                owners.append(t)
            action = replace(action, group=groups[rows])
        computes = action.kind in ("compute", "correct")
        stores = computes and any(steps[i] in track.last_read for i in members)
        action = replace(action, stores=stores, packed=track.packed and action.kind != "hold")
        if action.packed and stores:
            action = replace(action, reads=1)
        actions.append((track.history, action))
    return Phase(tuple(actions)), owners
