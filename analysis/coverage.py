"""Which part of a model's attention and of its MLPs the rows of a plan speak of."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.branches import branch_flops, branch_members
from graphcache.analysis.cost import flops
from graphcache.analysis.dataflow import LATENT, Dataflow
from graphcache.ir.graph import Branch, StepGraph
from graphcache.ir.plan import Plan
from graphcache.ir.resolve import resolve
from graphcache.ir.selector import STEM, Selector


@dataclass(frozen=True, slots=True)
class Coverage:
    """FLOPs of a step in attention or in MLPs: those that rows speak of, and all."""

    kind: str
    addressed: int
    total: int

    @property
    def share(self) -> float:
        return self.addressed / self.total if self.total else 1.0

    def __str__(self) -> str:
        count = f"{self.addressed / 1e6:.2f} of {self.total / 1e6:.2f} MFLOPs a step"
        return f"{self.share:.0%} of this model's {self.kind} FLOPs ({count})"


def coverage(step: StepGraph, plan: Plan) -> tuple[Coverage, ...]:
    """Of attention and of MLPs, as far as the plan has rows for them; the whole output speaks of all.

    Attention counts with its projections. A branch that is both counts for both.
    """
    kinds = {kind for row in plan.rows for kind in _meant(row.selector)}
    found = resolve(plan, step.branches, step.blocks)
    if found.output is not None:
        return ()
    ranged = {block for _, first, last in found.ranges for block in range(first, last + 1)}
    work = branch_flops(step)
    made = []
    for kind in sorted(kinds):
        sites = [branch for branch in step.branches if kind in _kinds(branch)]
        addressed = [b for b in sites if b.name in found.branches or b.block in ranged]
        outside = sum(map(flops, _loose(step))) if kind == "attention" else 0
        total = sum(work[branch.name] for branch in sites) + outside
        made.append(Coverage(kind, sum(work[branch.name] for branch in addressed), total))
    return tuple(made)


def _meant(selector: Selector) -> tuple[str, ...]:
    if selector.is_role:
        return _kinds_of(selector.name.removesuffix(".context"))
    return () if selector.is_guidance or selector.is_output else ("attention", "MLP")


def _kinds(branch: Branch) -> tuple[str, ...]:
    return _kinds_of(branch.role)


def _kinds_of(role: str) -> tuple[str, ...]:
    if role == "parallel":
        return "attention", "MLP"
    return ("MLP",) if role in ("mlp", "parallel.mlp", STEM) else ("attention",)


def _loose(step: StepGraph) -> Iterator[fx.Node]:
    """Attention on the latents that no branch holds."""
    flow = Dataflow(step)
    held = {name for names in branch_members(step).values() for name in names}
    for node in step.calls():
        if node.name not in held and ops.is_product(node):
            mixes = node.target in ops.ATTENTION or node.target in ops.CONTRACTIONS
            if mixes and all(flow.depends[item] & LATENT for item in ops.operands(node)):
                yield node
