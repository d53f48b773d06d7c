"""A real call's answers to what forward asks of values, and the same call traced with them."""

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import as_bytes
from graphcache.tracing.explanation import is_user_code
from graphcache.tracing.questions import KINDS, Kind


class Diverged(CaptureError):
    """Forward asks for other values while it is traced than it asked for in a real call."""

    def __init__(self) -> None:
        super().__init__("forward asks for other values while it is traced than in a real call")


@dataclass(frozen=True, slots=True)
class CodeLine:
    """A line of the user's code."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Answer:
    """What a real call found out at one place; `shapes` and `values` are those of the tensors asked."""

    function: Any
    place: CodeLine
    shapes: tuple[torch.Size, ...]
    values: tuple[bytes, ...]
    note: Any


@dataclass(frozen=True, slots=True)
class _Held:
    """Stands for a tensor in a note."""

    name: str


@dataclass
class Answers:
    """Those of one call, in their order, and the tensors in them.

    Tracing takes all but those whose numbers are `left`; `asked` are the tensors whose values these are.
    """

    left: frozenset[int] = frozenset()
    given: list[Answer] = field(default_factory=list)
    tensors: nn.Module = field(default_factory=nn.Module)
    asked: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    listens: bool = True
    _known: dict[Any, _Held] = field(default_factory=dict)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, nothing that is asked is written down."""
        self.listens = False
        try:
            yield
        finally:
            self.listens = True

    def record(self) -> TorchFunctionMode:
        """A mode within which a real call's answers are written down."""
        self.given.clear()
        self._known.clear()
        self.tensors = nn.Module()
        return _Record(self)

    @contextlib.contextmanager
    def replay(self, tensors: nn.Module) -> Iterator[None]:
        """Within it, the same call goes by these answers; `tensors` are their own, as tracing sees them.

        Raises:
            Diverged: it is another call.
        """
        self.asked.clear()
        replay = _Replay(self, tensors)
        with replay:
            yield
        replay.refuse_fewer()

    @property
    def values(self) -> tuple[bytes, ...]:
        """What the real call found in the tensors that tracing asks, in this order."""
        taken = [answer for number, answer in enumerate(self.given) if number not in self.left]
        return tuple([values for answer in taken for values in answer.values])

    def hold(self, note: Any) -> Any:
        """A note without its tensors, of which equal ones are kept once."""

        def held(tensor: torch.Tensor) -> _Held:
            key = tensor.dtype, tensor.device, tensor.shape, as_bytes(tensor)
            if key not in self._known:
                name = f"values{len(self._known)}"
                self.tensors.register_buffer(name, tensor.detach().clone())
                self._known[key] = _Held(name)
            return self._known[key]

        return _mapped(note, torch.Tensor, held)


class _Mode(TorchFunctionMode, ABC):
    """Handles whatever asks for values."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._answers.listens:
            return func(*args, **kwargs)
        if func is torch.Tensor.tolist:
            with self:
                return _listed(args[0])
        kind = KINDS.get(func)
        asked = kind.asked(args, kwargs) if kind else None
        return self._answer(kind, asked, func, args, kwargs) if kind and asked else func(*args, **kwargs)

    @abstractmethod
    def _answer(self, kind: Kind, asked: list[torch.Tensor], func: Any, args: Any, kwargs: Any) -> Any:
        """What a call that asks for values gives."""


class _Record(_Mode):
    def _answer(self, kind: Kind, asked: list[torch.Tensor], func: Any, args: Any, kwargs: Any) -> Any:
        shapes, values = tuple([tensor.shape for tensor in asked]), tuple(map(as_bytes, asked))
        note = kind.noted(func, args, kwargs)
        self._answers.given.append(Answer(func, _place(), shapes, values, self._answers.hold(note)))
        return kind.answered(func, args, kwargs, note)


class _Replay(_Mode):
    def __init__(self, answers: Answers, tensors: nn.Module) -> None:
        super().__init__(answers)
        self._tensors = tensors
        self._count = 0

    def _answer(self, kind: Kind, asked: list[torch.Tensor], func: Any, args: Any, kwargs: Any) -> Any:
        number, given = self._count, self._answers.given
        self._count += 1
        if number >= len(given) or (given[number].function, given[number].place) != (func, _place()):
            raise Diverged
        if number in self._answers.left:
            return func(*args, **kwargs)
        answer = given[number]
        if answer.shapes != tuple([tensor.shape for tensor in asked]):
            raise Diverged
        # what forward writes there later was not asked
        self._answers.asked += [(number, tensor.detach().clone()) for tensor in asked]
        note = _mapped(answer.note, _Held, lambda held: getattr(self._tensors, held.name))
        return kind.answered(func, args, kwargs, note)

    def refuse_fewer(self) -> None:
        if self._count != len(self._answers.given):
            raise Diverged


def _listed(tensor: torch.Tensor) -> Any:
    """What `tolist` gives, each number asked for by itself, as it is while tensors have no values."""
    return [_listed(row) for row in tensor] if tensor.dim() else tensor.item()


def _mapped(note: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(note, kind):
        return change(note)
    if isinstance(note, (list, tuple)):
        return type(note)([_mapped(item, kind, change) for item in note])
    return note


def _place() -> CodeLine:
    """The innermost line of the call at hand that belongs to the user."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_user_code(frame.f_code.co_filename):
        frame = frame.f_back
    return CodeLine(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
