"""Evaluations on the way to a gradient: some are held, of the others the inputs alone are kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphcache.compiler.phase_code import Runnable
from graphcache.ir.graph import Input

MEMORY = 4 << 30
"""Bytes that a generation may hold for its gradients, unless told otherwise."""


@dataclass
class GradientMemory:
    """Bytes that a generation may still hold."""

    left: int

    def takes(self, runnable: Runnable) -> bool:
        """Whether a run of the graph fits; it is counted if it does."""
        fits = runnable.computed_bytes <= self.left
        if fits:
            self.left -= runnable.computed_bytes
        return fits


def with_own_inputs(runnable: Runnable, fed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a graph is fed, with copies of the call's tensors: samplers may change those in place."""
    pairs = zip(runnable.step.inputs, fed, strict=True)
    return [tensor.clone() if isinstance(port, Input) else tensor for port, tensor in pairs]
