"""Captures at further sizes, filled in from one trace with symbols instead of traced again."""

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphcache.compiler.captured import Captured, examples_of
from graphcache.compiler.kept_captures import MOST_TRACES, KeptCaptures
from graphcache.ir.call import CallSpec, Key
from graphcache.ir.errors import CaptureError
from graphcache.passes.base import Observer
from graphcache.tracing.sized_call import is_size
from graphcache.tracing.sized_graph import SizedGraph
from graphcache.tracing.symbolic import Symbolic

FIXED = 2
"""Sizes that are traced as they are, which takes half as long as with symbols, where nobody says how many."""
_MOST_KINDS = 8
_MOST_IN_VAIN = 2
"""Traces of one kind, while none has served another call: some models make constants of all their sizes."""

log = logging.getLogger("graphcache")


@dataclass
class _Kind:
    """Calls of one kind.

    Attributes:
        fixed: how many were traced as they are, before symbols were tried.
        traces: those with symbols; None is one that failed, and the list too before any was looked for.
        used: those that were right for some call.
        served: whether one of them was right for a call that it was not made of.
    """

    fixed: int = 0
    traces: list[SizedGraph | None] | None = None
    used: list[SizedGraph] = field(default_factory=list)
    served: bool = False

    @property
    def may_be_traced(self) -> bool:
        """Whether another trace with symbols is worth its time."""
        most = MOST_TRACES if self.served else _MOST_IN_VAIN
        return self.traces is not None and None not in self.traces and len(self.traces) < most


class SymbolicCaptures:
    """Traces with symbols, by the kind of calls that they are for: those that differ in sizes alone.

    The first `fixed` of a kind are traced as they are, since most models have one size, or two prompts of
    different lengths; a further one with symbols, unless an earlier trace serves it, or one that was kept.
    """

    def __init__(self, fixed: int, kept: KeptCaptures) -> None:
        self._fixed = fixed
        self._kept = kept
        self._kinds: OrderedDict[Key, _Kind] = OrderedDict()

    def find(
        self,
        key: Key,
        model: nn.Module,
        call: CallSpec,
        tensors: Sequence[torch.Tensor],
        observers: Sequence[Observer],
        split: bool,
    ) -> tuple[Captured, SizedGraph | None] | None:
        """The capture of a call, and the trace if it is the first of it; None where it is traced by itself.

        Args:
            key: of its program.
            model: the original.
            call: how the tensors make up the call.
            tensors: its leaves.
            observers: told of every pass.
            split: fused branches as two sites.
        """
        kind = without_sizes(key)
        known = self._kinds.setdefault(kind, _Kind())
        self._kinds.move_to_end(kind)
        while len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)
        examples = examples_of(tensors)
        if not all(tensor.is_contiguous() for tensor in examples):
            return None
        if known.traces is None:
            known.traces = [*self._kept.traces(model, call, examples)]

        def filled(trace: SizedGraph) -> Captured | None:
            return Captured.at(trace, model, call, examples, observers, split)

        found = next(((made, trace) for trace in known.traces if trace and (made := filled(trace))), None)
        if found is not None:
            known.served = True
        elif known.fixed < self._fixed:
            known.fixed += 1
        elif known.may_be_traced:
            trace = _traced(model, call, examples)
            made = filled(trace) if trace else None
            # one that is not right for its own call is for none
            known.traces.append(trace if made else None)
            if made and trace:
                self._kept.keep_trace(model, call, examples, trace)
                found = made, trace
        if found is None:
            return None
        is_first = found[1] not in known.used
        known.used += [found[1]] * is_first
        return found[0], found[1] if is_first else None

    def forget_others(self, variants: set[int]) -> None:
        """Drop those of all forms of the model but these."""
        for kind in [kind for kind in self._kinds if kind[0] not in variants]:
            del self._kinds[kind]


def _traced(model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]) -> Symbolic | None:
    try:
        return Symbolic.of(model, call, tensors)
    except CaptureError as error:
        log.info("each size is traced by itself, because with symbols for sizes: %s", error)
        return None


def without_sizes(key: Key) -> Key:
    """What a program's key has in common with those of calls of other sizes."""
    return tuple(map(_without_size, key))


def _without_size(item: Any) -> Hashable:
    if not isinstance(item, tuple) or not item:
        return item
    if isinstance(item[0], torch.Size):
        return (len(item[0]), *item[1:])
    return "number" if item[0] is int and is_size(item[1]) else item
