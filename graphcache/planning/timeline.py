"""A plan met with a profile's sites: what happens to each of them at each step, and what is held."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from graphcache.analysis.liveness import lower
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.graph import Branch, block_count
from graphcache.ir.history import GUIDANCE, OUTPUT, PREDICTION, History, range_site
from graphcache.ir.plan import COMPUTE, Plan
from graphcache.ir.resolve import Resolution, resolve
from graphcache.ir.schedule import Role, Schedule
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

    `rows` are the plan's, met with the branches; `schedules` are those of one call, or of guidance's two
    branches where they are called one by one.
    """

    name: str
    plan: Plan
    profile: Profile
    branches: tuple[Branch, ...]
    rows: Resolution
    schedules: tuple[Schedule, ...]

    @property
    def schedule(self) -> Schedule:
        """That of the conditional branch, or of both."""
        return self.schedules[0]

    @property
    def text(self) -> str:
        """The plan as it is written."""
        return str(self.plan)

    @property
    def graphs(self) -> int:
        """Different steps, each a compiled graph."""
        return sum(len(schedule.phases) for schedule in self.schedules)

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
        return found | ({GUIDANCE: rows.guidance.actions} if rows.guidance else {})

    def _run(self, name: str, actions: str, block: int | None) -> str:
        line = []
        for step, symbol in zip(self.schedule.steps, actions, strict=True):
            phase = self.schedule.phases[step.phase]
            action = dict(phase.actions).get(History(name))
            held = action is not None and action.kind == "hold"
            if action is None and block is not None:
                held = self.schedule.is_skipped(phase, block)
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
        halves = 2 if self.schedule.guided and self.schedule.guided.conditional else 1
        bands = 2 if self.schedule.guided and self.schedule.guided.divisor is not None else 1
        found: dict[History, int] = {}
        for schedule in self.schedules:
            for phase in schedule.phases:
                for name, action in phase.actions:
                    entry = sites.get(name.site, widest) // halves
                    found[name] = max(found.get(name, 0), entry * 3 // 4 if action.packed else entry)
        calls = self.profile.calls
        return found | {History(GUIDANCE): sites.get(GUIDANCE, 0) * calls * bands, History(PREDICTION): 0}

    @cached_property
    def held(self) -> tuple[int, ...]:
        """Bytes that the caches hold after each step."""
        times = self.profile.calls if len(self.schedules) == 1 else 1
        return tuple(
            times * sum(schedule.held(step, self._with_patches) for schedule in self.schedules)
            for step in range(self.plan.steps)
        )

    @property
    def peak(self) -> int:
        """The most bytes at any time: what a step found, and beside it what it stored."""
        times = self.profile.calls if len(self.schedules) == 1 else 1
        return times * sum(schedule.peak(self._with_patches) for schedule in self.schedules)

    @cached_property
    def _with_patches(self) -> Mapping[History, int]:
        """A copy of a value that tokens are written into is as large as the value."""
        stored = {name for schedule in self.schedules for names in schedule.stores for name in names}
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
        schedules = tuple(lower(plan, branches, rows, role=role) for role in _roles(plan, profile))
    except PlanError as error:
        raise GraphCacheError(f"plan {name} does not fit the profile: {error}") from None
    return Timeline(name, plan, profile, branches, rows, schedules)


def _roles(plan: Plan, profile: Profile) -> tuple[Role, ...]:
    if not plan.is_guided:
        return ("only",)
    if profile.calls == 2:
        return "cond", "uncond"
    return ("doubled",)
