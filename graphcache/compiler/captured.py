"""A model's step for one signature, and the layout in which it takes its inputs."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from graphcache.compiler.pipeline import analysed
from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import StepGraph
from graphcache.ir.opaque import Opaque
from graphcache.passes.base import Observer
from graphcache.tracing.capture import capture
from graphcache.tracing.conditions import Conditions
from graphcache.tracing.homes import Homes
from graphcache.tracing.sized_graph import SizedGraph, StoredTrace

if TYPE_CHECKING:
    from graphcache.compiler.kept_captures import KeptCaptures

_LARGE = 1 << 16


@dataclass(frozen=True)
class Captured:
    """A model's step for one signature, before any plan.

    `kept` is where it and others like it are kept on disk, and `from_disk` whether it was found there.
    """

    step: StepGraph
    call: CallSpec
    output: OutputSpec
    strides: tuple[tuple[int, ...], ...]
    conditions: Conditions | None = None
    homes: Homes | None = None
    kept: "KeptCaptures | None" = None
    from_disk: bool = False

    @staticmethod
    def of(
        model: nn.Module,
        call: CallSpec,
        tensors: Sequence[torch.Tensor],
        observers: Sequence[Observer] = (),
        split: bool = False,
        asks: bool = False,
        before: Sequence[Opaque] = (),
        homes: Homes | None = None,
    ) -> "Captured":
        """Capture a call.

        Args:
            model: in eval mode.
            call: how the tensors make up the call.
            tensors: its leaves.
            observers: told of every pass.
            split: fused branches as two sites.
            asks: forward is known to ask for values.
            before: opaque calls of an earlier capture.
            homes: where weights are that are kept elsewhere than where the model computes.
        """
        examples = examples_of(tensors)
        step, output, conditions = capture(model, call, tuple(examples), asks, before, homes=homes)
        step = analysed(step, split, observers)
        return Captured(step, call, output, strides_of(examples), conditions, homes)

    @staticmethod
    def at(
        symbolic: SizedGraph,
        model: nn.Module,
        call: CallSpec,
        examples: Sequence[torch.Tensor],
        observers: Sequence[Observer],
        split: bool,
    ) -> "Captured | None":
        """A call at whose sizes a trace with symbols is right; None where it is not."""
        found = symbolic.at(model, call, examples)
        if found is None:
            return None
        step, output = found
        is_stored = isinstance(symbolic, StoredTrace)
        step = analysed(step, split, observers)
        return Captured(step, call, output, strides_of(examples), from_disk=is_stored)

    def elsewhere(
        self,
        symbolic: SizedGraph,
        model: nn.Module,
        tensors: Sequence[torch.Tensor],
        observers: Sequence[Observer],
        split: bool,
    ) -> "tuple[Captured, list[torch.Tensor]] | None":
        """The same call at other sizes, and its tensors there; None where its trace is right at no others.

        Small sizes stand in relations by chance, and large ones are costly: those are raised, these lowered.
        """
        examples = examples_of(tensors)
        are_large = sum(tensor.numel() for tensor in examples) > _LARGE
        for smaller in (are_large, not are_large):
            found = symbolic.elsewhere(examples, smaller)
            if found:
                call, others = found
                # nobody asked for these sizes, and the model may have none of them
                with contextlib.suppress(CaptureError):
                    made = Captured.at(symbolic, model, call, others, observers, split)
                    if made:
                        return made, others
        return None

    def again(
        self, model: nn.Module, tensors: Sequence[torch.Tensor], observers: Sequence[Observer]
    ) -> "Captured":
        """Capture the same call with other inputs."""
        split = any(branch.role == "parallel.mlp" for branch in self.step.branches)
        asks = self.conditions is not None

        def traced() -> Captured:
            return Captured.of(
                model, self.call, tensors, observers, split, asks, self.step.opaque, self.homes
            )

        if self.kept is None:
            return traced()
        return self.kept.captured(model, self.call, tensors, split, traced)


def examples_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs as a graph will be given them."""
    return distinct([_dense(tensor) for tensor in tensors])


def strides_of(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """How a call's tensors lie."""
    return tuple(tensor.stride() for tensor in tensors)


def distinct(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors, none of them twice the same object.

    Tracing would make one input of two that are one object in the first call, and without guards keep to
    that when they are two.
    """
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        result.append(tensor.view_as(tensor) if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return result


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The layout that the graph will be given: an expanded or sliced input is made contiguous."""
    dense = torch.empty_like(tensor).stride()
    return tensor if tensor.stride() == dense else tensor.contiguous()


def laid(strides: Sequence[tuple[int, ...]], tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The inputs in the layout that was captured; compiled code does not look at strides again."""
    if all(t.stride() == stride for t, stride in zip(tensors, strides, strict=True)):
        return tensors
    return [_lay(tensor, stride) for tensor, stride in zip(tensors, strides, strict=True)]


def _lay(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    if tensor.stride() == stride:
        return tensor
    made = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)
