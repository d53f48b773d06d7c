"""Captures of a forward that asks for values: with the answers of a real call, where these stay the same."""

import contextlib
import linecache
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from graphcache.ir.call import OutputSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import StepGraph, has_symbolic_shapes
from graphcache.libraries.torch_private import ITEM
from graphcache.tracing.answers import Answers, Diverged
from graphcache.tracing.conditions import Conditions, separated, varying
from graphcache.tracing.explanation import BRANCHES
from graphcache.tracing.untraceable import Untraceable

_ON_NUMBERS = (operator.eq, torch.ops.aten.item.default, ITEM)


class Traced(NamedTuple):
    """A graph, the structure of its result, and the values that it is right for, None for any."""

    step: StepGraph
    output: OutputSpec
    conditions: Conditions | None


class _Varying(CaptureError):
    """What forward asks for in the questions so numbered is another value at each step."""

    def __init__(self, numbers: frozenset[int], text: str) -> None:
        super().__init__(text)
        self.numbers = numbers


def traced(attempt: Callable[[Answers | None], Traced], asks: bool) -> Traced:
    """Trace a model, with answers only if it cannot be without or has unknown sizes that have to be known.

    A graph with unknown sizes, such as how many places of a mask are set, holds for all of them, and stays as
    it is. Where they are numbers taken from tensors, such as bounds of slices, Inductor does not compile it;
    where they have to be equal to others, it computes at every step what could be computed once.

    Args:
        attempt: traces it; given answers, it calls the model for real before, and writes them down.
        asks: whether it is known to need them.

    Raises:
        CaptureError: it cannot be traced, or asks for values that are others at each step.
    """
    if asks:
        with contextlib.suppress(CaptureError):
            return _traced_with_answers(attempt)
    failed: Untraceable | None = None
    try:
        plain = attempt(None)
        if not _has_to_know_sizes(plain.step):
            return plain
    except Untraceable as error:
        failed = error
    try:
        return _traced_with_answers(attempt)
    except Diverged:
        if failed is not None:
            raise failed from failed.__cause__
    except CaptureError as error:
        if failed is not None:
            raise Untraceable(str(error), failed.around, failed.cause) from error.__cause__
    return plain


def _has_to_know_sizes(step: StepGraph) -> bool:
    return any(node.target in _ON_NUMBERS for node in step.graph.nodes) and has_symbolic_shapes(step)


def _traced_with_answers(attempt: Callable[[Answers | None], Traced]) -> Traced:
    """Trace with answers; what varies is left to tracing, which can do without where no size is needed."""
    answers = Answers()
    first: _Varying | None = None
    while True:
        try:
            return attempt(answers)
        except _Varying as error:
            first = first or error
            left = answers.left | error.numbers
            if len(left) == len(answers.given):
                raise first from None
            answers = Answers(left)
        except CaptureError:
            if first is not None:
                raise first from None
            raise


def decided(
    step: StepGraph, output: OutputSpec, answers: Answers, tensors: Sequence[torch.Tensor], advice: str
) -> Traced:
    """Take what was asked out of a graph that was traced with answers, whose last results it is.

    Raises:
        CaptureError: it depends on the latents or on the time; `advice` is appended.
    """
    step, asked = separated(step, output.count)
    behind: dict[int, dict[str, None]] = {}
    for (number, _), result in zip(answers.asked, asked.results(), strict=True):
        for port in varying(asked, result):
            behind.setdefault(number, {})[port.name] = None
    if not behind:
        conditions = Conditions.of(asked, tensors)
        if conditions.expected != answers.values:
            raise Diverged
        return Traced(step, output, conditions)
    place, names = answers.given[min(behind)].place, ", ".join(behind[min(behind)])
    line = linecache.getline(place.file, place.line).strip()
    raise _Varying(
        frozenset(behind),
        f"the model cannot be captured because of {place.file}:{place.line} in {place.function}: `{line}`: "
        f"what it asks for depends on {names}, and is another value at each step. "
        f"{BRANCHES}{'.' * bool(advice)}{advice}",
    )
