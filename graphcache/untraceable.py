"""Finds the modules that cannot be traced, calls them for real, and stands in for them while a model is traced."""

import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.explanation import because
from graphcache.ir.errors import CaptureError
from graphcache.ir.opaque import Opaque, opaque_call
from graphcache.opaque import Invocation, OpaqueCall, Unfit, is_foreign, named, put_together
from graphcache.purity import Impure, held_memory, observed

Forward = Callable[..., Any]


class Untraceable(CaptureError):
    """A model can be called but not be traced.

    `around` are the paths of the modules around the place where tracing stopped, from the inside out.
    """

    def __init__(self, reason: str, around: Sequence[str], cause: str) -> None:
        super().__init__(reason)
        self.around = around
        self.cause = cause


class OpaqueModules:
    """The modules of a model that are called in the middle of its graph, each with its cause by its path."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._model = model
        self._causes: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._first: CaptureError | None = None
        self._calls: dict[str, list[OpaqueCall]] = {}
        self._met: Counter[str] = Counter()
        for path, module in self._modules.items():
            foreign = [name for name, value in _own_tensors(module) if is_foreign(value)]
            if path and foreign:
                kind = type(getattr(module, foreign[0])).__name__
                self._causes[path] = f": its {foreign[0]} is a {kind}, of which tracing sees the bytes alone"

    @property
    def calls(self) -> tuple[OpaqueCall, ...]:
        """Every call that the traced graph holds."""
        return tuple(call for path, calls in self._calls.items() for call in calls[: self._met[path]])

    def widen(self, error: Untraceable) -> None:
        """Call a module around the place where tracing stopped, and those like it: the innermost that will do.

        Raises:
            CaptureError: no module is left but the model itself.
        """
        self._first = self._first or error
        for path in error.around:
            if path in self._causes:
                for other in self._alike(path):
                    self._causes.pop(other, None)
                    self._reasons.setdefault(other, error.cause)
        chosen = next((path for path in error.around if path and path not in self._reasons), None)
        if chosen is None:
            tried = [f"{named(path)} be called as it is{why}" for path, why in self._reasons.items()]
            also = f". Nor can {tried[-1]}" if tried else ""
            raise CaptureError(f"{self._first}{also}") from self._first.__cause__
        self._causes |= dict.fromkeys(self._alike(chosen), error.cause)
        inner = [path for path in self._causes if any(map(path.startswith, _prefixes(self._causes)))]
        for path in inner:
            del self._causes[path]

    def _alike(self, path: str) -> list[str]:
        wanted = _likeness(self._modules[path])
        return [other for other, module in self._modules.items() if other and _likeness(module) == wanted]

    def observe(self, call: Callable[[], Any], numbers: Sequence[Tensor]) -> None:
        """Call the model for real, and see what its opaque modules are given and return.

        Args:
            call: calls the model.
            numbers: the tensors in it that stand for numbers, which a module may take in another way.

        Raises:
            Untraceable: a module cannot stand in a graph, one around it may.
            CaptureError: a module does more than compute.
        """
        if not self._causes:
            return
        self._calls = {path: [] for path in self._causes}
        held = held_memory(self._model)
        problems: list[tuple[str, list[str], Exception]] = []

        def seen(path: str, forward: Forward, args: Any, kwargs: Any) -> Any:
            found: OpaqueCall | Exception
            try:
                invocation, tensors = Invocation.of(self._modules[path], args, kwargs)
                if any(tensor is number for tensor in tensors for number in numbers):
                    raise Unfit("is given the timestep as a number")
            except Unfit as error:
                found, result = error, forward(*args, **kwargs)
            else:
                found, result = observed(
                    path, self._causes[path], invocation, tensors, lambda: forward(*args, **kwargs), held
                )
            if isinstance(found, Exception):
                problems.append((path, self._around(_frames()), found))
            else:
                self._calls[path].append(found)
            return result

        with self._instead(seen):
            call()
        for path, around, problem in problems:
            text = f"{named(path)} cannot be traced{self._causes[path]}"
            if isinstance(problem, Impure):
                raise CaptureError(
                    f"{text}. It cannot be called as it is either, since it {problem}, which a step that reuses "
                    "its result would leave out: make its forward pure"
                ) from problem
            raise Untraceable(f"{text}; it {problem}", around, f": it {problem}") from problem

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """While the model is traced its opaque modules are single operations."""

        def stand_in(path: str, forward: Forward, args: Any, kwargs: Any) -> Any:
            module, place = self._modules[path], self._met[path]
            self._met[path] += 1
            invocation, tensors = Invocation.of(module, args, kwargs)
            if place >= len(self._calls[path]) or not invocation.is_like(self._calls[path][place].invocation):
                raise Unfit("is given other arguments while it is traced than in a real call")
            call = self._calls[path][place]
            weights = [_attribute(module, name) for name in call.weights]
            return put_together(call.template, opaque_call(call, tensors, weights, call.described))

        with self._instead(stand_in):
            yield

    def begin(self) -> None:
        """The model's forward begins."""
        self._met.clear()

    @contextlib.contextmanager
    def _instead(self, act: Callable[[str, Forward, Any, Any], Any]) -> Iterator[None]:
        """Let something else happen in the modules' forwards, in this thread alone and not within it."""
        here, within = threading.get_ident(), set[str]()

        def replacement(path: str, forward: Forward) -> Forward:
            def instead(*args: Any, **kwargs: Any) -> Any:
                if path in within or threading.get_ident() != here:
                    return forward(*args, **kwargs)
                within.add(path)
                try:
                    return act(path, forward, args, kwargs)
                finally:
                    within.discard(path)

            return instead

        with contextlib.ExitStack() as stack:
            for path in self._causes:
                module = self._modules[path]
                stack.callback(_put_back, module, module.__dict__.get("forward"))
                module.__dict__["forward"] = replacement(path, module.forward)
            yield

    def around_error(self, error: BaseException) -> list[str]:
        """The modules in whose forward an error was raised, from the inside out."""
        seen: set[int] = set()
        chain: BaseException | None = error
        while chain is not None and id(chain) not in seen:
            seen.add(id(chain))
            frames, trace = list[FrameType](), chain.__traceback__
            while trace is not None:
                frames.append(trace.tb_frame)
                trace = trace.tb_next
            around = self._around(reversed(frames))
            if around:
                return around
            chain = chain.__cause__ or chain.__context__
        return []

    def _around(self, frames: Any) -> list[str]:
        """The modules whose methods run in frames, in their order; tracing runs proxies with the same attributes."""
        paths = {id(module.__dict__): path for path, module in reversed(self._modules.items())}
        found = (paths.get(id(getattr(frame.f_locals.get("self"), "__dict__", None))) for frame in frames)
        return [path for path in dict.fromkeys(found) if path]


def told(calls: Sequence[Opaque]) -> list[str]:
    """Which modules are called as they are, and why, one line for those that are alike."""
    groups: dict[tuple[str, str, str], set[str]] = {}
    for call in calls:
        key = re.sub(r"\d+", "*", call.place), type(call.module).__name__, call.cause
        groups.setdefault(key, set()).add(call.place)
    return [
        f"{named(pattern if len(places) > 1 else min(places))} ({len(places)} of {kind}) cannot be traced{cause}; it is "
        "called as it is at every step that computes it"
        for (pattern, kind, cause), places in groups.items()
    ]


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def _prefixes(paths: Any) -> list[str]:
    return [f"{path}." for path in paths]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for table in module._parameters, module._buffers:
        yield from ((name, value) for name, value in table.items() if value is not None)


def _likeness(module: nn.Module) -> Any:
    """Equal for modules that presumably can or cannot be traced together: their sizes do not count."""
    tensors = {(name, type(value), value.dtype) for name, value in _own_tensors(module)}
    switches = {(name, value) for name, value in vars(module).items() if isinstance(value, (bool, str))}
    return type(module), tensors, switches


def _attribute(module: nn.Module, path: str) -> Any:
    """A parameter; looked up in the tables themselves, which tracing fills with what it records."""
    *owners, name = path.split(".")
    for owner in owners:
        module = module.__dict__["_modules"][owner]
    return module.__dict__["_parameters"][name]
