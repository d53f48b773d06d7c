"""A plan met with a profile's sites: what happens to each of them at each step, and what is held."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from graphcache.analysis.liveness import lower
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.graph import Branch, block_count
from graphcache.ir.history import GUIDANCE, OUTPUT, PREDICTION, History, range_site
from graphcache.ir.plan import COMPUTE, Plan
from graphcache.ir.resolve import Resolution, resolve
from graphcache.ir.schedule import Phase, Role, Schedule, Step
from graphcache.planning.profile import Profile, parsed

HOLD = "-"
"""Neither computed nor taken: something around the site is taken from the cache."""


def branches_of(profile: Profile, split: bool = False) -> tuple[Branch, ...]:
    """The residual branches that a profile's sites are named after; their graph is not known.

    Args:
        profile: whose sites' names are read.
        split: whether fused branches are taken apart into attention and MLP.
    """
    names = [site.name for site in (*profile.sites, *profile.unmeasured) if site.kind == "branch"]
    found = [(name, parsed(name)) for name in names]
    paths = [match["path"] if match else name for name, match in found]
    order = {path: block for block, path in enumerate(dict.fromkeys(paths))}
    result: list[Branch] = []
    for (name, match), path in zip(found, paths, strict=True):
        block, role = order[path], match["role"] if match else ""
        depth = block / (len(order) - 1) if len(order) > 1 else 0.0
        context = bool(match and match["context"])
        branch = Branch(name, role, context, block, depth, name, name, name)
        result += _halves(branch) if split and role == "parallel" else [branch]
    return tuple(result)


def _halves(branch: Branch) -> list[Branch]:
    names = {part: f"{branch.name}.{part}" for part in ("attention", "mlp")}
    return [replace(branch, name=n, role=f"parallel.{part}", value=n) for part, n in names.items()]


@dataclass(frozen=True, eq=False)
class Timeline:
    """A plan of a name on a profile's model.

    `rows` are the plan's, met with the branches; `turns` has for each model that takes over the schedules of
    its steps: that of one call, or those of guidance's two branches where they are called one by one.
    """

    name: str
    plan: Plan
    profile: Profile
    branches: tuple[Branch, ...]
    rows: Resolution
    turns: tuple[tuple[Schedule, ...], ...]

    def at(self, step: int) -> tuple[Phase, Step]:
        """What the conditional branch, or both, do at a step."""
        starts = (0, *self.profile.handovers)
        turn = bisect_right(starts, step) - 1
        schedule = self.turns[turn][0]
        made = schedule.steps[step - starts[turn]]
        return schedule.phases[made.phase], made

    @property
    def text(self) -> str:
        """The plan as it is written."""
        return str(self.plan)

    @property
    def graphs(self) -> int:
        """Different steps, each a compiled graph."""
        return sum(len({step.phase for step in one.steps}) for turn in self.turns for one in turn)

    @cached_property
    def whole(self) -> tuple[int, ...]:
        """Steps at which nothing is taken from the cache."""
        return tuple(t for t in range(self.plan.steps) if not self.taken(t))

    def taken(self, step: int) -> tuple[str, ...]:
        """The sites that a step takes from the cache, without those inside them."""
        corrected = {letter.symbol for letter in self.plan.letters if letter.is_compute}
        computed = {COMPUTE, HOLD, *corrected}
        return tuple(name for name, line in self.symbols.items() if line[step] not in computed)

    @cached_property
    def symbols(self) -> Mapping[str, str]:
        """By site one character a step: the plan's, or `HOLD`. Sites that nothing is done to are absent."""
        blocks = {branch.name: branch.block for branch in self.branches}
        rows = self.rows
        actions = {name: row.actions for name, row in rows.branches.items()}
        actions |= {range_site(first, last): row.actions for row, first, last in rows.ranges}
        actions |= {OUTPUT: rows.output.actions} if rows.output else {}
        actions = dict.fromkeys(blocks, COMPUTE * self.plan.steps) | actions
        found = {name: self._run(name, line, blocks.get(name)) for name, line in actions.items()}
        if rows.guidance:
            pairs = enumerate(rows.guidance.actions)
            first = self.profile.handovers
            found[GUIDANCE] = "".join(COMPUTE if step in first else symbol for step, symbol in pairs)
        return found

    def _run(self, name: str, actions: str, block: int | None) -> str:
        line = []
        ranges = self.turns[0][0]
        for step, symbol in enumerate(actions):
            phase, _ = self.at(step)
            action = dict(phase.actions).get(History(name))
            held = action is not None and action.kind == "hold"
            if action is None and block is not None:
                held = ranges.is_skipped(phase, block)
            computed = action is not None and action.kind == "compute"
            line.append(HOLD if held else COMPUTE if computed else symbol)
        return "".join(line)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Sites that the plan speaks of and the profile did not measure."""
        known = {site.name for site in self.profile.sites}
        return tuple(name for name in self.symbols if name not in known)

    @cached_property
    def sizes(self) -> Mapping[History, int]:
        """Bytes of one entry of every history, by what the profile tells of its site.

        Of a batch that holds both branches of guidance each half is cached for itself where a plan has steps
        without one. An entry of `linear8` has three bytes for each of four. The conditional result, which
        only the other call of its step reads, does not count.
        """
        every = (*self.profile.sites, *self.profile.unmeasured)
        sites = {site.name: site.bytes_kept for site in every}
        widest = max((site.bytes_kept for site in every if site.kind == "branch"), default=0)
        guided = self.turns[0][0].guided
        halves = 2 if guided and guided.conditional else 1
        bands = 2 if guided and guided.divisor is not None else 1
        found: dict[History, int] = {}
        for schedule in self._schedules:
            for phase in schedule.phases:
                for name, action in phase.actions:
                    entry = sites.get(name.site, widest) // halves
                    found[name] = max(found.get(name, 0), entry * 3 // 4 if action.packed else entry)
        calls = self.profile.calls
        return found | {History(GUIDANCE): sites.get(GUIDANCE, 0) * calls * bands, History(PREDICTION): 0}

    @cached_property
    def held(self) -> tuple[int, ...]:
        """Bytes that the caches hold after each step."""
        found, before = list[int](), 0
        for turn in self.turns:
            own = [sum(one.held(n, self._with_patches) for one in turn) for n in range(len(turn[0].steps))]
            found += [before + size for size in own]
            before = found[-1]
        return tuple(self._times * size for size in found)

    @property
    def peak(self) -> int:
        """The most bytes at any time: what a step found, and beside it what it stored.

        A model whose turn is over keeps what it held, for it does not know that.
        """
        most = before = 0
        for turn in self.turns:
            most = max(most, before + sum(one.peak(self._with_patches) for one in turn))
            before += sum(one.held(len(one.steps) - 1, self._with_patches) for one in turn)
        return self._times * most

    @property
    def _times(self) -> int:
        """Calls of a step that each schedule stands for."""
        return self.profile.calls if len(self.turns[0]) == 1 else 1

    @property
    def _schedules(self) -> tuple[Schedule, ...]:
        return tuple(schedule for turn in self.turns for schedule in turn)

    @cached_property
    def _with_patches(self) -> Mapping[History, int]:
        """A copy of a value that tokens are written into is as large as the value."""
        stored = {name for schedule in self._schedules for names in schedule.stores for name in names}
        return {**self.sizes} | {
            name: self.sizes[name._replace(content="value")] for name in stored - self.sizes.keys()
        }


def meet(name: str, plan: Plan, profile: Profile) -> Timeline:
    """Lower a plan for a profile's model.

    Raises:
        GraphCacheError: it has another number of steps, is for another model, or speaks of other sites.
    """
    made = profile.provenance
    if plan.steps != profile.steps:
        raise GraphCacheError(
            f"plan {name} has {plan.steps} steps and the profile {profile.steps}; make the plan for "
            f"{profile.steps} steps, for example by plan.resample({profile.steps})"
        )
    if plan.graph is not None and plan.graph != made.graph:
        raise GraphCacheError(
            f"plan {name} is for model {plan.graph} and the profile of {made.graph}; give plans that were "
            "made from this profile"
        )
    branches = branches_of(profile, plan.splits_parallel)
    try:
        rows = resolve(plan, branches, block_count(branches))
        turns = tuple(
            tuple(_lowered(plan, branches, rows, role, *turn) for role in _roles(plan, profile))
            for turn in pairwise((0, *profile.handovers, plan.steps))
        )
    except PlanError as error:
        raise GraphCacheError(f"plan {name} does not fit the profile: {error}") from None
    return Timeline(name, plan, profile, branches, rows, turns)


def _lowered(
    plan: Plan, branches: Sequence[Branch], rows: Resolution, role: Role, start: int, end: int
) -> Schedule:
    """The schedule of a model's turn: lowered as if it went on to the last step, which it cannot tell."""
    whole = lower(plan, branches, rows, start=start, role=role)
    return replace(whole, steps=whole.steps[: end - start])


def _roles(plan: Plan, profile: Profile) -> tuple[Role, ...]:
    if not plan.is_guided:
        return ("only",)
    if profile.calls == 2:
        return "cond", "uncond"
    return ("doubled",)
