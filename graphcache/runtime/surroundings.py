"""What the `with` statements around a call say: its session, its cache context, whether the plan holds."""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from types import FrameType, MappingProxyType
from typing import Any

from graphcache.ir.errors import StateError
from graphcache.runtime.session import Session, runner_now


@dataclass(frozen=True, slots=True, eq=False)
class Surroundings:
    """Session, cache context and its step fields; `outer` are those around these."""

    session: Session
    name: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    disabled: bool = False
    outer: "Surroundings | None" = None

    def changed(self, **changes: Any) -> "Surroundings":
        return replace(self, **changes, outer=self)

    def is_within(self, other: "Surroundings") -> bool:
        """Whether these are the others, or stand inside of them."""
        now: Surroundings | None = self
        while now is not None and now is not other:
            now = now.outer
        return now is other


_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR

_here: ContextVar[Mapping["Scopes", Surroundings]] = ContextVar("graphcache", default=MappingProxyType({}))


class Scopes:
    """The surroundings of one engine's calls, in every thread, asyncio task and generator.

    What a function enters holds for its thread or task, as context variables do. What a generator enters
    holds for the calls that the generator makes, in whatever thread it is resumed, and for no others.
    """

    def __init__(self, outermost: Surroundings) -> None:
        self.outermost = outermost
        self._generators: dict[FrameType, Surroundings] = {}

    @property
    def now(self) -> Surroundings:
        """Those of a call made from here."""
        found = _here.get().get(self, self.outermost)
        if not self._generators:
            return found
        inner = next((self._generators[f] for f in _frames() if f in self._generators), None)
        return found if inner is None or found.is_within(inner) else inner

    def enter(self, surroundings: Surroundings) -> Callable[[], None]:
        """Set the surroundings for the code that entered a `with`; returns what puts the old ones back."""
        frame = entering()
        if frame.f_code.co_flags & _GENERATOR:
            return self._set_for_generator(frame, surroundings)
        token = _here.set({**_here.get(), self: surroundings})
        return lambda: _put_back(token)

    def _set_for_generator(self, frame: FrameType, surroundings: Surroundings) -> Callable[[], None]:
        before = self._generators.get(frame)
        self._generators[frame] = surroundings

        def put_back() -> None:
            if before is None:
                self._generators.pop(frame, None)
            else:
                self._generators[frame] = before

        return put_back


def _put_back(token: Token[Mapping[Scopes, Surroundings]]) -> None:
    try:
        _here.reset(token)
    except ValueError as error:
        raise StateError(
            "a session or cache context was entered in one thread or task and left in another; enter and "
            "leave it around each step: `session = model.session()`, `with session:` where steps are made"
        ) from error


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_contextlib(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "contextlib"


def entering() -> FrameType:
    """The frame whose `with` is being entered, behind all context managers that do so on its behalf."""
    frames = (frame for frame in _frames() if frame.f_code.co_filename != __file__)
    frame = next(frames)
    for outer in frames:
        inside = frame.f_code.co_flags & _GENERATOR and _is_contextlib(outer)
        if not (inside or _is_contextlib(frame) or frame.f_code.co_name in ("__enter__", "__aenter__")):
            return frame
        frame = outer
    return frame


class Around:
    """Sets the surroundings of an engine's calls, and puts the old ones back."""

    def __init__(self, scopes: Scopes, change: Callable[[Surroundings], Surroundings]) -> None:
        self._scopes = scopes
        self._change = change
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Around":
        self._undo.append(self._scopes.enter(self._change(self._scopes.now)))
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.pop()()


class OpenSession(Around):
    """A session with caches of its own, which it keeps from one `with` to the next until it is closed.

    An exception that leaves the `with` ends the generation in progress. A generation that has come to its end
    holds nothing, and neither does a session that is closed or that nobody refers to any more.
    """

    def __init__(self, scopes: Scopes, session: Session) -> None:
        super().__init__(scopes, lambda around: Surroundings(session, outer=around))
        self._session = session
        self._inside: Any = None
        self._entering = threading.Lock()

    def __enter__(self) -> "OpenSession":
        """Calls that are made from here on belong to the session.

        Raises:
            StateError: it was closed, or another thread or task is inside.
        """
        runner = runner_now()
        with self._entering:
            if self._session.closed:
                raise StateError("this session was closed; open another one with model.session()")
            if self._undo and self._inside is not runner:
                raise StateError(
                    "another thread or task has entered this session and not left it; one at a time makes "
                    "its steps, so give each request a session of its own"
                )
            self._inside = runner
            self._session.driver.below = id(entering())
            super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if error and error[0] is not None:
            self._session.forget()

    def close(self) -> None:
        """Free all caches; a generation in progress is given up, and no call can be made any more."""
        self._session.close()
