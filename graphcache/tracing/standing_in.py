"""Real calls of the modules that are not traced, and operations that stand in for them while others are."""

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn

from graphcache.ir.errors import CaptureError
from graphcache.ir.opaque import Opaque, opaque_call
from graphcache.ir.tree import fill
from graphcache.tracing.opaque import Invocation, Unfit, named
from graphcache.tracing.purity import Impure, held_memory, observed
from graphcache.tracing.untraceable import CalledAsTheyAre, Untraceable

Forward = Callable[..., Any]
Act = Callable[[str, Forward, Any, Any], Any]
"""What happens instead of the forward of the module at a path, with these arguments and keywords."""


class StandIns:
    """Observes the chosen modules in a real call, and stands in for them while the model is traced."""

    def __init__(self, model: nn.Module, chosen: CalledAsTheyAre) -> None:
        self._model = model
        self.chosen = chosen
        self._calls: dict[str, list[Any]] = {}
        self._met: Counter[str] = Counter()

    @property
    def calls(self) -> tuple[Opaque, ...]:
        """Every call in the graph that was traced last."""
        return tuple(call for path, calls in self._calls.items() for call in calls[: self._met[path]])

    def observe(self, run: Callable[[], Any], numbers: Sequence[Tensor]) -> None:
        """See what the chosen modules are given and return.

        Args:
            run: calls the model for real.
            numbers: tensors in that call that stand for numbers, with which a module may compute otherwise.

        Raises:
            Untraceable: a module cannot stand in a graph, one around it may.
            CaptureError: a module does more than compute.
        """
        self._calls = {path: [] for path in self.chosen.causes}
        if not self._calls:
            return
        held = held_memory(self._model)
        problems: list[tuple[str, list[str], Exception]] = []

        def see(path: str, forward: Forward, args: Any, kwargs: Any) -> Any:
            found: Opaque | Exception
            try:
                invocation, tensors = Invocation.of(self.chosen.modules[path], args, kwargs)
                if any(tensor is number for tensor in tensors for number in numbers):
                    raise Unfit("is given the timestep as a number")
            except Unfit as error:
                found, result = error, forward(*args, **kwargs)
            else:
                cause = self.chosen.causes[path]
                found, result = observed(
                    path, cause, invocation, tensors, lambda: forward(*args, **kwargs), held
                )
            if isinstance(found, Exception):
                problems.append((path, self.chosen.around(_frames()), found))
            else:
                self._calls[path].append(found)
            return result

        with self._instead(see):
            run()
        for path, around, problem in problems:
            self._refuse(path, around, problem)

    @contextlib.contextmanager
    def apart(self, around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
        """The chosen modules are called as they are, each within a context of its own."""

        def call(path: str, forward: Forward, args: Any, kwargs: Any) -> Any:
            with around():
                return forward(*args, **kwargs)

        with self._instead(call):
            yield

    def _refuse(self, path: str, around: list[str], problem: Exception) -> None:
        text = f"{named(path)} cannot be traced{self.chosen.causes[path]}"
        if isinstance(problem, Impure):
            raise CaptureError(
                f"{text}. Nor can it be called as it is: it {problem}, and a part of a graph must give the "
                "same for the same inputs and do nothing else"
            ) from problem
        raise Untraceable(f"{text}; it {problem}", around, f": it {problem}") from problem

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """The chosen modules are single operations."""

        def stand_in(path: str, forward: Forward, args: Any, kwargs: Any) -> Any:
            module, place, calls = self.chosen.modules[path], self._met[path], self._calls[path]
            self._met[path] += 1
            invocation, tensors = Invocation.of(module, args, kwargs)
            if place >= len(calls) or not invocation.is_like(calls[place].invocation):
                raise Unfit("is given other arguments while it is traced than in a real call")
            call = calls[place]
            weights = [_weight(module, name) for name in call.weights]
            return fill(call.template, opaque_call(call, tensors, weights))

        with self._instead(stand_in):
            yield

    def begin(self) -> None:
        """The traced model's forward begins."""
        self._met.clear()

    @contextlib.contextmanager
    def _instead(self, act: Act) -> Iterator[None]:
        """Let something else happen in place of the modules' forwards, in this thread alone."""
        with contextlib.ExitStack() as stack:
            for path in self.chosen.causes:
                attributes = self.chosen.modules[path].__dict__
                stack.callback(_put_back, attributes, attributes.get("forward"))
                attributes["forward"] = _replacement(path, self.chosen.modules[path].forward, act)
            yield


def _replacement(path: str, forward: Forward, act: Act) -> Forward:
    here, is_inside = threading.get_ident(), False

    @functools.wraps(forward)
    def instead(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        if is_inside or threading.get_ident() != here:
            return forward(*args, **kwargs)
        is_inside = True
        try:
            return act(path, forward, args, kwargs)
        finally:
            is_inside = False

    return instead


def _put_back(attributes: dict[str, Any], forward: Any) -> None:
    if forward is None:
        del attributes["forward"]
    else:
        attributes["forward"] = forward


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _weight(module: nn.Module, path: str) -> Any:
    """A parameter, looked up in the tables themselves: tracing puts there what it follows."""
    *owners, name = path.split(".")
    for owner in owners:
        module = module.__dict__["_modules"][owner]
    return module.__dict__["_parameters"][name]
