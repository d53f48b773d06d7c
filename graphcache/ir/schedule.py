"""A plan after lowering: few phases, and for every step which of them runs on what."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from graphcache.ir.history import GUIDANCE, OUTPUT, PREDICTION, History
from graphcache.ir.letter import Letter

Kind = Literal["compute", "correct", "reuse", "forecast", "tokens", "hold"]

Role = Literal["only", "doubled", "cond", "uncond"]
"""What calls a schedule is for: without guidance, on a batch that holds both branches, or those of one
of two branches that are called one after the other."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How many tokens of a site are computed: a number or a fraction of them, rounded to a multiple.

    `blend`, of clusters alone, is the share by which the other tokens move.
    """

    count: int | float
    multiple: int = 1
    blend: float | None = None

    @staticmethod
    def of(letter: Letter) -> "Budget":
        options = dict(letter.options)
        count, blend = options["count"], options.get("blend")
        assert not isinstance(count, str)
        return Budget(count, int(options["multiple"]), None if blend is None else float(blend))

    def among(self, tokens: int) -> int:
        """The number out of so many; at least one multiple unless none is asked for."""
        wanted = self.count * tokens if isinstance(self.count, float) else self.count
        rounded = max(1, int(wanted / self.multiple + 0.5)) * self.multiple if wanted else 0
        return min(rounded, tokens)


@dataclass(frozen=True, slots=True)
class Measure:
    """The score of a site's tokens that a phase hands out; `shared`: the mean over the batch's halves."""

    by: str
    queries: float = 1.0
    shared: bool = False

    @staticmethod
    def of(letter: Letter, shared: bool) -> "Measure":
        options = dict(letter.options)
        return Measure(str(options["by"]), float(options.get("queries", 1.0)), shared)


UNCORRECTED = (1.0, 0.0)
"""The coefficients by which a corrected phase gives what it computes."""


@dataclass(frozen=True, slots=True)
class Action:
    """What a phase does to one site.

    `reads` history entries are loaded, combined by the coefficients of `group` (-1: the newest as it is),
    `optional` ones where there are any; `stores` hands the raw value out. What is `packed` is the newest
    value in bfloat16, its difference to the one before in 8 bits and that one's scales. `tokens` computes a
    `budget` of them and writes them into the newest value; `patches` into a copy of it, which is then what
    `patched` actions read. A `measure` hands scores out. `hold` leaves the site alone: a range around it is
    reused.
    """

    kind: Kind
    reads: int = 0
    group: int = -1
    stores: bool = False
    packed: bool = False
    budget: Budget | None = None
    patches: bool = False
    patched: bool = False
    measure: Measure | None = None
    optional: bool = False

    def __str__(self) -> str:
        text: str = self.kind
        if self.budget is not None:
            text += f" {self.budget.count}"
        if self.reads:
            text += f" reads {self.reads}" + " if any" * self.optional
        if self.group >= 0:
            text += f" by {self.group}"
        for name in ("packed", "patched", "patches", "stores"):
            text += f" {name}" if getattr(self, name) else ""
        return text + (f" measures {self.measure.by}" if self.measure else "")


@dataclass(frozen=True)
class Phase:
    """A distinct column of the lowered plan: one specialised graph.

    `half` phases run the graph that was captured at half the batch, on its conditional half.
    """

    actions: tuple[tuple[History, Action], ...]
    half: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether the unconditional branch is made from the conditional one's result."""
        return any(history.site == GUIDANCE and action.kind == "forecast" for history, action in self.actions)


def _stored(phase: Phase) -> Iterator[History]:
    for history, action in phase.actions:
        if action.stores:
            yield history
        if action.patches:
            yield history.patched


@dataclass(frozen=True, slots=True)
class Guided:
    """How the branches of guidance meet in the graphs.

    `conditional` is the half of a doubled batch, "first" or "last"; None where the branches are called one by
    one. `divisor` gives the radius of the low band, None when the difference is not split; `grid` are frames,
    height and width of packed tokens.
    """

    conditional: str | None
    divisor: int | None
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """An operand of a product, kept whole so that chosen tokens of `sites` can meet it.

    `node` is its node, `readers` are all sites whose values it goes into.
    """

    history: History
    node: str
    sites: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The tokens of a site that are chosen where it was computed whole, for the steps after it.

    `steps` are those of the plan at which a budget of tokens is computed, each with its letter; `cycle` is
    the number of steps up to the next one that computes the site whole.
    """

    history: History
    steps: tuple[tuple[int, Letter], ...]
    cycle: int
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Step:
    """One step: its phase, the coefficients of each group, and the entries of each history live after it."""

    phase: int
    coefficients: tuple[tuple[float, ...], ...]
    keep: Mapping[History, int]
    selections: tuple[Selection, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Phases, steps, and the ranges (name, first block, last block) that the phases speak of."""

    phases: tuple[Phase, ...]
    steps: tuple[Step, ...]
    ranges: tuple[tuple[str, int, int], ...]
    guided: Guided | None = None
    memories: tuple[Memory, ...] = ()

    @cached_property
    def stores(self) -> tuple[frozenset[History], ...]:
        """Histories that each phase stores."""
        return tuple(frozenset(_stored(phase)) for phase in self.phases)

    @cached_property
    def movable(self) -> frozenset[History]:
        """Histories of features that nothing writes into and that later steps alone read."""
        fixed = {GUIDANCE, PREDICTION}
        for phase in self.phases:
            fixed |= {history.site for history, action in phase.actions if action.budget or action.measure}
        fixed |= {selection.history.site for step in self.steps for selection in step.selections}
        stored = frozenset[History]().union(*self.stores)
        return frozenset(name for name in stored if name.site not in fixed and name.content != "operand")

    def branches(self, step: int) -> int:
        """Branches of guidance that a step evaluates: one or both of a doubled batch, else one or none."""
        phase = self.phases[self.steps[step].phase]
        doubled = self.guided is not None and self.guided.conditional is not None
        return 1 + doubled - phase.is_answered

    def is_skipped(self, phase: Phase, block: int) -> bool:
        """Whether a block lies within a range, or the output, that the phase takes from the cache."""
        taken = {history.site for history, action in phase.actions if action.kind in ("reuse", "forecast")}
        inside = (name for name, first, last in self.ranges if first <= block <= last)
        return OUTPUT in taken or not taken.isdisjoint(inside)

    def held(self, step: int, size: Mapping[History, int]) -> int:
        """Bytes that the state holds after a step, given the bytes of one entry of each history."""
        return sum(size[history] * count for history, count in self.steps[step].keep.items() if count)

    def peak(self, size: Mapping[History, int]) -> int:
        """The most bytes held at any time: what a step found, and beside it what it stored."""
        most = before = 0
        for index, step in enumerate(self.steps):
            stored = sum(size[history] for history in self.stores[step.phase])
            most = max(most, before + stored)
            before = self.held(index, size)
        return most

    def __str__(self) -> str:
        lines = []
        for index, phase in enumerate(self.phases):
            steps = [str(i) for i, step in enumerate(self.steps) if step.phase == index]
            half = " at half the batch" if phase.half else ""
            lines.append(f"phase {index}{half}: steps {' '.join(steps)}")
            lines += [f"  {history}: {action}" for history, action in phase.actions]
        return "\n".join(lines)
