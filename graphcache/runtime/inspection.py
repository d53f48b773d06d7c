"""`inspect`: what graphcache sees in a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graphcache.analysis.branches import branch_flops
from graphcache.analysis.cost import graph_flops
from graphcache.compiler.captured import examples_of
from graphcache.ir.graph import storage_bytes, value_of
from graphcache.ir.plan import Plan
from graphcache.ir.roles import Names
from graphcache.ir.text import describe
from graphcache.runtime.engine import Engine, original
from graphcache.runtime.options import Options
from graphcache.tracing.free_sizes import FreeSizes
from graphcache.tracing.untraceable import told


@dataclass(frozen=True)
class SiteReport:
    """A residual branch: `shape` and `bytes` of one cached value, and its share of the step's FLOPs."""

    name: str
    role: str
    block: int
    shape: str
    bytes: int
    flops: int
    share: float


@dataclass(frozen=True)
class Inspection:
    """The sites of a model for one signature; FLOPs are those of one step, per batch as given.

    `opaque` says which modules are called because they cannot be traced, and why; `sizes` which sizes of the
    call may change without another trace, where that was asked for.
    """

    sites: tuple[SiteReport, ...]
    blocks: int
    flops: int
    hoisted_flops: int
    nodes: int
    opaque: tuple[str, ...] = ()
    sizes: FreeSizes = field(default_factory=FreeSizes)

    @property
    def roles(self) -> dict[str, int]:
        """Number of sites of each role, `.context` told apart."""
        return dict(Counter(site.role for site in self.sites))

    def __str__(self) -> str:
        width = max((len(site.name) for site in self.sites), default=4)
        lines = [f"{'site':{width}} {'shape':18} {'MFLOPs':>10} {'share':>6}"]
        lines += [
            f"{site.name:{width}} {site.shape:18} {site.flops / 1e6:10.2f} {site.share:6.1%}"
            for site in self.sites
        ]
        return "\n".join((*lines, self.totals, *self.opaque, *self.sizes.lines))

    @property
    def totals(self) -> str:
        """One line: blocks, sites by role, FLOPs."""
        rest = 1 - sum(site.share for site in self.sites)
        roles = ", ".join(f"{count} {role}" for role, count in self.roles.items())
        return (
            f"{self.blocks} blocks, {len(self.sites)} sites ({roles}), {self.flops / 1e6:.2f} MFLOPs a step "
            f"({rest:.1%} outside the sites); {self.hoisted_flops / 1e6:.2f} MFLOPs are computed once"
        )


def inspect(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    sizes: bool = False,
) -> Inspection:
    """Capture a model and report its sites: names, roles, shapes, FLOPs.

    Args:
        model: an nn.Module in eval mode, transformed or not.
        example_inputs: arguments of one call, as a mapping of keywords or a tuple of positions.
        timestep: forward's timestep argument, and
        latents: those that hold the latents, as for `transform`.
        sizes: whether the call is traced once more, with symbols for its sizes, to say which may change
            without another trace, and what fixes the others.

    Raises:
        CaptureError: the model cannot be captured; the message says why.
    """
    engine = Engine(original(model), Options(Plan(1), names=Names.of(timestep, latents)))
    program = engine.prepare(example_inputs)
    step = program.step
    total = graph_flops(step)
    work = branch_flops(step)
    nodes = step.nodes()
    reports = tuple(
        SiteReport(
            name=branch.name,
            role=branch.role + (".context" if branch.context else ""),
            block=branch.block,
            shape=describe(value_of(nodes[branch.value])),
            bytes=storage_bytes(value_of(nodes[branch.value])),
            flops=work[branch.name],
            share=work[branch.name] / total if total else 0.0,
        )
        for branch in step.branches
    )
    hoisted = graph_flops(program.prologue.step) if program.prologue else 0
    opaque = tuple(told(step.opaque))
    found = FreeSizes()
    if sizes:
        tensors = engine.prepared(example_inputs, engine.options.plan, "")[2]
        found = FreeSizes.of(engine.model, program.captured.call, examples_of(tensors))
    return Inspection(reports, step.blocks, total, hoisted, len(step.calls()), opaque, found)
