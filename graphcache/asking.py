"""Captures of a forward that asks for values: with the answers of a real call, where these stay the same."""

import contextlib
import linecache
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from graphcache.answers import Answers, Diverged
from graphcache.compile import has_symbolic_shapes
from graphcache.conditions import Conditions, separated, varying
from graphcache.explanation import BRANCHES
from graphcache.ir.call import OutputSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import StepGraph


class Traced(NamedTuple):
    """A graph, the structure of its result, and the values that it is right for, None for any."""

    step: StepGraph
    output: OutputSpec
    conditions: Conditions | None


class Untraceable(CaptureError):
    """The model can be called, but not be traced."""


class _Varying(CaptureError):
    """What forward asks for in the question so numbered is another value at each step."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


def traced(attempt: Callable[[Answers | None], Traced], asks: bool) -> Traced:
    """Trace a model, with answers only if it cannot be without or has sizes that depend on them.

    Args:
        attempt: traces it; given answers, it calls the model for real before, and writes them down.
        asks: whether it is known to need them.

    Raises:
        CaptureError: it cannot be traced, or asks for values that are others at each step.
    """
    if asks:
        with contextlib.suppress(CaptureError):
            return _traced_with_answers(attempt)
    failed: CaptureError | None = None
    try:
        plain = attempt(None)
        if not has_symbolic_shapes(plain.step):
            return plain
    except Untraceable as error:
        failed = error
    try:
        return _traced_with_answers(attempt)
    except Diverged:
        if failed is not None:
            raise failed from failed.__cause__
    except CaptureError:
        if failed is not None:
            raise
    return plain


def _traced_with_answers(attempt: Callable[[Answers | None], Traced]) -> Traced:
    try:
        return attempt(Answers())
    except _Varying as error:
        if not error.number:
            raise
        try:
            return attempt(Answers(error.number))
        except CaptureError:
            raise error from None


def decided(
    step: StepGraph, output: OutputSpec, answers: Answers, tensors: Sequence[torch.Tensor], advice: str
) -> Traced:
    """Take what was asked out of a graph that was traced with answers, whose last results it is.

    Raises:
        CaptureError: it depends on the latents or on the time; `advice` is appended.
    """
    step, asked = separated(step, output.count)
    for (number, _), result in zip(answers.asked, asked.results(), strict=True):
        if ports := varying(asked, result):
            place, names = answers.given[number].place, ", ".join(port.name for port in ports)
            line = linecache.getline(place.file, place.line).strip()
            raise _Varying(
                number,
                f"the model cannot be captured because of {place.file}:{place.line} in {place.function}: "
                f"`{line}`: what it asks for depends on {names}, and is another value at each step. "
                f"{BRANCHES}{'.' * bool(advice)}{advice}",
            )
    return Traced(step, output, Conditions.of(asked, tensors))
