"""Captures at further sizes, filled in from one trace with symbols instead of traced again."""

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphcache.compiler.captured import Captured, examples_of
from graphcache.ir.call import CallSpec, Key
from graphcache.ir.errors import CaptureError
from graphcache.passes.base import Observer
from graphcache.tracing.sized_call import is_size
from graphcache.tracing.symbolic import Symbolic

FIXED = 2
"""Sizes that are traced as they are, which takes half as long as with symbols, where nobody says how many."""
_MOST_KINDS = 8
_MOST_TRACES = 4
"""Of one kind of calls: a model may fold otherwise at some sizes, as where a batch is 1."""
_MOST_IN_VAIN = 2
"""Of these, while none has served another call: some models make constants of all their sizes."""

log = logging.getLogger("graphcache")


@dataclass
class _Kind:
    """Calls of one kind.

    Attributes:
        fixed: how many were traced as they are, before symbols were tried.
        traces: those with symbols; None is one that failed.
        served: whether one of them was right for a call that it was not made of.
    """

    fixed: int = 0
    traces: list[Symbolic | None] = field(default_factory=list)
    served: bool = False

    @property
    def may_be_traced(self) -> bool:
        """Whether another trace with symbols is worth its time."""
        most = _MOST_TRACES if self.served else _MOST_IN_VAIN
        return None not in self.traces and len(self.traces) < most


class SymbolicCaptures:
    """Traces with symbols, by the kind of calls that they are for: those that differ in sizes alone.

    The first `fixed` of a kind are traced as they are, since most models have one size, or two prompts of
    different lengths; a further one with symbols, unless an earlier trace serves it.
    """

    def __init__(self, fixed: int = FIXED) -> None:
        self._fixed = fixed
        self._kinds: OrderedDict[Key, _Kind] = OrderedDict()

    def find(
        self,
        key: Key,
        model: nn.Module,
        call: CallSpec,
        tensors: Sequence[torch.Tensor],
        observers: Sequence[Observer],
        split: bool,
    ) -> tuple[Captured, Symbolic | None] | None:
        """The capture of a call, and the trace if it was made now; None where it has to be traced by itself.

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
        if known.fixed < self._fixed:
            known.fixed += 1
            return None
        examples = examples_of(tensors)
        if not all(tensor.is_contiguous() for tensor in examples):
            return None

        def filled(trace: Symbolic | None) -> Captured | None:
            return Captured.at(trace, model, call, examples, observers, split) if trace else None

        made = next(filter(None, map(filled, known.traces)), None)
        if made is not None or not known.may_be_traced:
            known.served = known.served or made is not None
            return (made, None) if made else None
        trace = _traced(model, call, examples)
        made = filled(trace)
        # one that is not right for its own call is for none
        known.traces.append(trace if made else None)
        return (made, trace) if made else None

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
