"""What profiling and tuning may hold at a time, and what is spared where that is little."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.stretches import Stretches
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.graph import Input, has_static_shape, value_of
from graphcache.planning.in_stretches import InStretches, SiteNodes
from graphcache.planning.recording import SKETCH

LEAST_TOKENS = 1 / 32
"""The smallest share of a branch's tokens by which its effects are estimated."""
_FLOAT = 4
_SIGN_AND_BUCKET = 5
"""Bytes that the sketch keeps for every number of a value."""
_GRADIENTS = 2
"""Times what a stretch computes: for its gradients that is kept, and as much computed of it."""


@dataclass(frozen=True)
class Share:
    """How a limit of memory is spent.

    Attributes:
        held: bytes of evaluations that are held for the way back.
        stride: how another evaluation runs again; see `Evaluation`.
        tokens: the share of a branch's tokens whose gradients are kept.
    """

    held: int
    stride: int = 1
    tokens: float = 1.0


@dataclass(frozen=True)
class Needs:
    """What one generation and its way back take, in bytes.

    Attributes:
        fixed: what is always there: of profiling gradients of ranges, output and guidance, sketches, the
            calls' tensors.
        branches: gradients of the branches at all tokens.
        passing: what comes and goes while an evaluation runs again, by `Share.stride`.
        purpose: what this is for.
        advice: what takes less.
    """

    fixed: int
    branches: int
    passing: Mapping[int, int]
    purpose: str = "profiling"
    advice: str = 'a smaller window= or detail="steps", which needs no gradients of branches, takes less'

    @staticmethod
    def of(probed: InStretches, *, steps: int, window: int, calls: int) -> "Needs":
        """Of a model's graph.

        Args:
            probed: it.
            steps: evaluations of a branch of guidance.
            window: steps back to which effects are followed.
            calls: branches of guidance that are called one by one.
        """
        inside = {branch.name for branch in probed.runnable.step.block_branches}
        values = [
            (site.name in inside, _numbers(probed, name)) for site in probed.sites for name in site.values
        ]
        gradients = calls * (window + 1) * _FLOAT
        sketches = _FLOAT * sum(_sketched(site, probed) for site in probed.sites)
        fixed = gradients * sum(numbers for is_branch, numbers in values if not is_branch)
        fixed += calls * steps * (input_bytes(probed.runnable) + sketches)
        fixed += _SIGN_AND_BUCKET * sum({numbers for _, numbers in values})
        branches = gradients * sum(numbers for is_branch, numbers in values if is_branch)
        return Needs(fixed, branches, passing([probed.stretches]))

    @property
    def least(self) -> int:
        """Bytes without which there is no profile."""
        return self.fixed + min(self.passing.values()) + int(LEAST_TOKENS * self.branches)

    def share(self, memory: int) -> Share:
        """What a generation does with so many bytes.

        Raises:
            GraphCacheError: they are too few.
        """
        if memory < self.least:
            raise GraphCacheError(
                f"memory={memory} is less than {self.purpose} needs here: {self.least} bytes; {self.advice}"
            )
        whole = [n for n, size in self.passing.items() if self.fixed + size + self.branches <= memory]
        stride = whole[0] if whole else min(self.passing, key=self.passing.__getitem__)
        left = memory - self.fixed - self.passing[stride]
        tokens = min(1.0, left / self.branches) if self.branches else 1.0
        return Share(left - int(tokens * self.branches), stride, tokens)


def _numbers(probed: InStretches, name: str) -> int:
    """Of a value; 0 where its size depends on data."""
    node = probed.nodes[name]
    return value_of(node).numel() if has_static_shape(node) else 0


def _sketched(site: SiteNodes, probed: InStretches) -> int:
    """Numbers that a site's values are reduced to; ranks sketch their parts as large as the whole."""
    if site.holdings:
        return sum(min(SKETCH, math.prod(held.shape)) for held in site.holdings)
    return sum(min(SKETCH, _numbers(probed, name)) for name in site.values)


def input_bytes(runnable: Runnable) -> int:
    """Of the call's tensors, which are copied at every step."""
    return sum(value_of(node).nbytes for port, node in runnable.step.ports() if isinstance(port, Input))


def passing(graphs: Sequence[Stretches]) -> dict[int, int]:
    """The most that comes and goes while one evaluation of some graphs runs again, by the stride."""
    longest = max(len(stretches.parts) for stretches in graphs)
    strides = (0, *(2**power for power in range(longest.bit_length())))
    return {stride: max(_passing(stretches, stride) for stretches in graphs) for stride in strides}


def _passing(stretches: Stretches, stride: int) -> int:
    """Bytes that come and go while one evaluation runs again."""
    sizes, crossing, parts = stretches.sizes, stretches.crossing(), stretches.parts
    if not stride:
        return sum(part.bytes for part in parts) + max(part.bytes for part in parts)
    across = [sum(sizes[name] for name in names) for names in crossing]
    again = max(sum(across[first : first + stride]) for first in range(0, len(parts), stride))
    return sum(across[::stride]) + again * (stride > 1) + _GRADIENTS * max(part.bytes for part in parts)
