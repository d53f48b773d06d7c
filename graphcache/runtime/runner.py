"""Runs one step of one branch: feeds a phase its tensors and keeps what later steps read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphcache.compiler.captured import distinct, laid
from graphcache.compiler.histories import refuse_others
from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.program import Program
from graphcache.ir.call import Key
from graphcache.ir.errors import StateError
from graphcache.ir.graph import CacheRead, Chosen, Hoisted, Input, Table
from graphcache.ir.history import GUIDANCE, PREDICTION, History
from graphcache.ir.plan import Plan
from graphcache.ir.schedule import Role, Schedule, Selection, Step
from graphcache.ir.state import CacheState, Choice, Entry
from graphcache.ir.versions import version
from graphcache.runtime.selection import SiteTokens, choose

_PREDICTED = History(PREDICTION)
_ANY = History("")


@dataclass
class BranchState:
    """One branch's place in its generation, and what it keeps.

    `step` is the plan's step of the latest call; the schedule begins at `start`. `watched` are the prologue's
    inputs with their versions: the hoisted values are right for these. `role` says which calls of guidance
    these are. `constants` are the latest call's other inputs, by which branches are told apart, with their
    `versions`; `steady` are those that were the same in all calls. `ran` is what the branch has done since
    its generation began, `kept` what its caches were trimmed to, `mark` PyTorch's count at its latest call.
    """

    key: Key
    program: Program
    schedule: Schedule
    start: int
    step: int
    role: Role = "only"
    cache: CacheState = field(default_factory=CacheState)
    watched: tuple[tuple[torch.Tensor, int], ...] | None = None
    constants: tuple[torch.Tensor, ...] = ()
    hoisted_bytes: int = 0
    ready: dict[int, Runnable] = field(default_factory=dict)
    chosen: dict[int, dict[History, Choice]] = field(default_factory=dict)
    versions: tuple[int, ...] = ()
    steady: frozenset[int] | None = None
    ran: list["Ran"] = field(default_factory=list)
    kept: Mapping[History, int] | None = None
    mark: int | None = None

    def note(self, constants: tuple[torch.Tensor, ...], versions: tuple[int, ...]) -> None:
        """Take up the inputs of a call."""
        if self.constants:
            pairs = zip(constants, self.constants, versions, self.versions, strict=False)
            same = frozenset(i for i, (a, b, now, then) in enumerate(pairs) if a is b and now == then)
            self.steady = same if self.steady is None else self.steady & same
        self.constants, self.versions = constants, versions

    @property
    def rewritten(self) -> list[torch.Tensor]:
        """The latest call's inputs that were written in place since."""
        pairs = zip(self.constants, self.versions, strict=True)
        return [tensor for tensor, then in pairs if version(tensor) != then]

    @property
    def now(self) -> Step:
        return self.schedule.steps[self.step - self.start]

    @property
    def finished(self) -> bool:
        return self.step + 1 == self.start + len(self.schedule.steps)


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that was run: its number in the plan, the schedule's index, and whether values were hoisted."""

    step: int
    program: Program
    schedule: Schedule
    index: int
    hoisted: bool


Evaluate = Callable[[Runnable, list[torch.Tensor]], Sequence[torch.Tensor]]


def _called(runnable: Runnable, fed: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    return runnable.call(*fed)


def run_step(state: BranchState, tensors: Sequence[torch.Tensor], evaluate: Evaluate = _called) -> Any:
    """One evaluation: the phase of the state's current step, on flat inputs in signature order.

    `evaluate` runs a phase's graph on what it is fed, one tensor per input port.
    """
    program, cache, step = state.program, state.cache, state.now
    inputs = laid(program.captured.strides, tensors)
    hoists = state.watched is None
    if hoists:
        run_prologue(state, tensors, inputs)
    runnable = state.ready.get(step.phase)
    if runnable is None:
        runnable = state.ready[step.phase] = program.phase(state.schedule, step.phase)
        refuse_others(cache, runnable)
    cache.chosen = state.chosen.pop(state.step, {})
    results = evaluate(runnable, feed(cache, runnable, inputs, step))
    count = position = program.captured.output.count
    for history, parts in runnable.stored:
        cache.store(history, tuple(results[position : position + parts]))
        position += parts
    if step.selections:
        _choose(state, evaluate)
    if runnable.stored or step.keep is not state.kept:
        cache.trim(step.keep)
        state.kept = step.keep
    state.ran.append(Ran(state.step, program, state.schedule, state.step - state.start, hoists))
    if state.finished:
        end(state)
    return program.captured.output.build(results[:count])


def end(state: BranchState) -> None:
    """Drop what holds for one generation, its inputs included."""
    state.constants, state.versions = (), ()
    state.chosen.clear()
    state.cache.hoisted, state.cache.half_hoisted = {}, None
    state.watched = None


def changed_inputs(state: BranchState, tensors: Sequence[torch.Tensor]) -> set[int]:
    """Leaves that the prologue read and that are another object, or another version, now."""
    if not state.watched:
        return set()
    return {
        index
        for index, (tensor, then) in zip(state.program.prologue_inputs, state.watched, strict=True)
        if tensors[index] is not tensor or version(tensor) != then
    }


def begun(key: Key, program: Program, plan: Plan, step: int, role: Role, shared: bool = False) -> BranchState:
    """The state of a branch that begins with this step."""
    return BranchState(key, program, program.schedule(plan, step, role, shared), step, step, role)


def halved(state: BranchState, key: Key, program: Program, plan: Plan, step: int) -> BranchState | None:
    """The state for half the batch, where guidance ended: what the plan's conditional half had cached.

    None where the plan does not say which half that is, or where that is not what the new signature caches.
    """
    if plan.conditional is None or state.program.batch != 2 * program.batch:
        return None
    entries = _own_rows(state) if state.role == "doubled" else _conditional_rows(state, program, plan)
    if entries is None:
        return None
    kept = BranchState(key, program, program.schedule(plan, state.start), state.start, step, mark=state.mark)
    kept.cache.entries = entries
    half = None if state.role == "doubled" else _half(program, plan)
    kept.chosen = {later: _half_choices(choices, half) for later, choices in state.chosen.items()}
    return kept


def carried(state: BranchState, key: Key, program: Program, schedule: Schedule) -> BranchState | None:
    """The state for the same calls of a model in another form, such as with another adapter's scale: it reads
    what the form before has cached.

    None where the two cache other things.
    """
    if schedule != state.schedule or _kinds(program, schedule) != _kinds(state.program, schedule):
        return None
    kept = BranchState(key, program, schedule, state.start, state.step, state.role, mark=state.mark)
    kept.cache.entries, kept.chosen = state.cache.entries, state.chosen
    return kept


def _kinds(program: Program, schedule: Schedule) -> Mapping[History, list[tuple[torch.Size, torch.dtype]]]:
    """Shape and dtype of an entry of every history."""
    entries = program.entries(schedule).items()
    return {history: [(part.shape, part.dtype) for part in parts] for history, parts in entries}


def hand_over(conditional: BranchState | None, state: BranchState) -> None:
    """Give the unconditional branch the conditional one's result of the same step.

    Raises:
        StateError: there is none, because the calls come in another order.
    """
    if conditional is None or conditional.step != state.step or _PREDICTED not in conditional.cache.entries:
        raise StateError(
            f"step {state.step}: row guidance needs the conditional branch's result before the other's; "
            "call model.cache_context('cond') first at every step, then ('uncond')"
        )
    state.cache.entries[_PREDICTED] = conditional.cache.entries.pop(_PREDICTED)


def _own_rows(state: BranchState) -> dict[History, list[Entry]]:
    """The histories of a doubled batch's conditional half."""
    entries = state.cache.entries.items()
    return {name: kept for name, kept in entries if name.site != GUIDANCE and not name.unconditional}


def _conditional_rows(state: BranchState, program: Program, plan: Plan) -> dict[History, list[Entry]] | None:
    """One half of the batch of every entry, where the batch is not folded into another dimension."""
    half = _half(program, plan)
    expected = program.entries(state.schedule)
    halves: dict[History, list[Entry]] = {}
    for history, entries in state.cache.entries.items():
        halves[history] = [tuple(part[half].clone() for part in entry) for entry in entries]
        shapes = [part.shape for part in expected[history]]
        for entry, half_entry in zip(entries, halves[history], strict=True):
            outermost = all(part.shape[0] == state.program.batch for part in entry)
            if not outermost or [part.shape for part in half_entry] != shapes:
                return None
    return halves


def _half(program: Program, plan: Plan) -> slice:
    """The conditional half of a batch twice as large as the program's."""
    return slice(program.batch) if plan.conditional == "first" else slice(program.batch, None)


def _half_choices(choices: Mapping[History, Choice], half: slice | None) -> dict[History, Choice]:
    """Those of a doubled batch's conditional half, or one half of each."""
    if half is None:
        return {name: choice for name, choice in choices.items() if not name.unconditional}
    return {name: Choice(choice.places[half], choice.clusters[half]) for name, choice in choices.items()}


def run_prologue(state: BranchState, tensors: Sequence[torch.Tensor], laid: Sequence[torch.Tensor]) -> None:
    """Compute what holds for the whole generation."""
    program = state.program
    prologue = program.prologue
    state.watched, state.cache.hoisted, state.cache.half_hoisted = (), {}, None
    if prologue is not None:
        inputs = [laid[port.index] for port in prologue.step.inputs if isinstance(port, Input)]
        values = prologue.call(*distinct(inputs))
        names = (port.name for port in prologue.step.outputs if isinstance(port, Hoisted))
        state.cache.hoisted = dict(zip(names, values, strict=True))
        state.hoisted_bytes = state.cache.hoisted_bytes()
        state.watched = tuple((tensors[i], version(tensors[i])) for i in program.prologue_inputs)


def _choose(state: BranchState, evaluate: Evaluate) -> None:
    """Choose the tokens of the steps up to the next one that computes their sites whole."""
    program, entries = state.program, state.cache.entries
    numbers = {branch.name: number for number, branch in enumerate(program.captured.step.branches)}
    alike: dict[tuple[Selection, SiteTokens, torch.Size], dict[History, torch.Tensor]] = {}
    for selection in state.now.selections:
        history = selection.history
        given = (entries.pop(history.scores, None) or [(_newest(state, history, evaluate),)])[0][0]
        rows, count = program.tokens[history.site]
        tokens = SiteTokens(
            rows // 2 if state.role == "doubled" else rows, count, given.device, selection.grid
        )
        alike.setdefault((replace(selection, history=_ANY), tokens, given.shape), {})[history] = given
    for (selection, tokens, _), scores in alike.items():
        sites = [numbers[history.site] for history in scores]
        made = choose(selection, tokens, state.step, sites, list(scores.values()))
        for history, choices in zip(scores, made, strict=True):
            for step, choice in choices.items():
                state.chosen.setdefault(step, {})[history] = choice


def _newest(state: BranchState, history: History, evaluate: Evaluate) -> torch.Tensor:
    """The newest value of a site, of which ranks may have parts."""
    value = state.cache.entries[history][0][0]
    gathering = state.program.gathering(state.schedule, state.now.phase, history)
    return value if gathering is None else evaluate(gathering, [value])[0]


def feed(
    cache: CacheState, runnable: Runnable, inputs: Sequence[torch.Tensor], step: Step
) -> list[torch.Tensor]:
    """One tensor per input port; on the path of every step, hence no look-up twice."""
    entries, hoisted = cache.entries, cache.hoisted
    if runnable.half is not None:
        inputs = laid(runnable.half.strides, runnable.half.rows.inputs(inputs))
        if cache.half_hoisted is None:
            cache.half_hoisted = runnable.half.hoisted_rows(hoisted)
        hoisted = cache.half_hoisted
    places = runnable.places
    try:
        tensors = [entries[history][entry][part] for history, entry, part in places.entries]
    except (KeyError, IndexError):  # too little is cached as yet
        tensors = [_read(cache, runnable, port) for port in places.reads]
    for port in places.others:
        if isinstance(port, Input):
            tensors.append(inputs[port.index])
        elif isinstance(port, Hoisted):
            tensors.append(hoisted[port.name])
        elif isinstance(port, CacheRead):
            tensors.append(_read(cache, runnable, port))
        elif isinstance(port, Table):
            tensors.append(runnable.tables[port])
        elif isinstance(port, Chosen):
            choice = cache.chosen[port.history]
            tensors.append(choice.clusters if port.clusters else choice.places)
        else:
            tensors.append(runnable.coefficients(port.group, step.coefficients[port.group]))
    if places.order:
        tensors = [tensors[i] for i in places.order]
    return tensors if len(set(map(id, tensors))) == len(tensors) else distinct(tensors)


def _read(cache: CacheState, runnable: Runnable, port: CacheRead) -> torch.Tensor:
    """What a port reads that is more than one look-up."""
    entries = cache.entries.get(port.history)
    if entries and port.changed and torch.is_grad_enabled():
        # what a graph saved for its gradient must not change after it
        entries[0] = tuple(part.clone() for part in entries[0])
    if entries:
        # a history that is shorter than the forecast's order is padded with its newest at weight 0
        return entries[port.entry if port.entry < len(entries) else 0][port.part]
    if port.optional:
        return runnable.blank(port)
    raise StateError(f"{port.history}: nothing is cached that this step could read; call reset()")
