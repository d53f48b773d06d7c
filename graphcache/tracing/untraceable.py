"""Which modules of a model cannot be traced: the innermost around each place where tracing stops."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn

from graphcache.ir.attributes import attributes_of
from graphcache.ir.errors import CaptureError
from graphcache.ir.opaque import Opaque
from graphcache.tracing.opaque import is_foreign, named

_NAMED = 4
"""Paths in a message."""


class Untraceable(CaptureError):
    """A model can be called but not be traced.

    `around` are the paths of the modules around the place where tracing stopped, from the inside out; `cause`
    ends a sentence that begins with one of them.
    """

    def __init__(self, reason: str, around: Sequence[str], cause: str) -> None:
        super().__init__(reason)
        self.around = around
        self.cause = cause


class CalledAsTheyAre:
    """The modules that are called instead of traced: `causes` says why, by their paths.

    Args:
        model: none but itself may be left.
        before: opaque calls of an earlier capture, whose modules are not tried again.
    """

    def __init__(self, model: nn.Module, before: Iterable[Opaque]) -> None:
        self.modules = dict(model.named_modules())
        same = [call for call in before if self.modules.get(call.place) is call.module]
        self.causes = {call.place: call.cause for call in same}
        self._errors: dict[str, Untraceable] = {}
        self._unfit: dict[str, str] = {}
        for path, module in self.modules.items():
            foreign = [(name, value) for name, value in _own_tensors(module) if is_foreign(value)]
            if path and foreign:
                name, value = foreign[0]
                kind = type(value).__name__
                self.causes[path] = f": its {name} is a {kind}, of which tracing sees the bytes alone"
        self._drop_inner()

    def widen(self, error: Untraceable) -> None:
        """Choose the innermost module around the place where tracing stopped that will do, and those like it.

        Raises:
            CaptureError: no module is left but the model itself.
        """
        for path in error.around:
            if path in self.causes:
                for other in self._alike(path):
                    self.causes.pop(other, None)
                    self._unfit.setdefault(other, error.cause)
        inner = self._inner()
        left = [path for path in error.around if path not in self._unfit and not path.startswith(inner)]
        if not left:
            tried = [(path, self._unfit[path]) for path in error.around if path in self._unfit]
            first = next((self._errors[path] for path in error.around if path in self._errors), error)
            also = [f". Nor can {named(path)} be called as it is{why}" for path, why in tried]
            raise CaptureError(f"{first}{''.join(also)}") from first.__cause__
        for path in self._alike(left[0]):
            self._errors[path], self.causes[path] = error, error.cause
        self._drop_inner()

    def _inner(self) -> tuple[str, ...]:
        """How paths of modules begin that are called within another."""
        return tuple(f"{path}." for path in self.causes)

    def _drop_inner(self) -> None:
        inner = self._inner()
        self.causes = {path: cause for path, cause in self.causes.items() if not path.startswith(inner)}

    def _alike(self, path: str) -> list[str]:
        wanted = _likeness(self.modules[path])
        return [other for other, module in self.modules.items() if other and _likeness(module) == wanted]

    def around_error(self, error: BaseException) -> list[str]:
        """The modules in whose methods an error was raised, from the inside out."""
        seen: set[int] = set()
        chain: BaseException | None = error
        while chain is not None and id(chain) not in seen:
            seen.add(id(chain))
            frames, trace = list[FrameType](), chain.__traceback__
            while trace is not None:
                frames.append(trace.tb_frame)
                trace = trace.tb_next
            around = self.around(reversed(frames))
            if around:
                return around
            chain = chain.__cause__ or chain.__context__
        return self._around_constant(str(error))

    def _around_constant(self, text: str) -> list[str]:
        """The modules around a value that PyTorch could not follow, which it says when it has traced them."""
        found = re.search(r"\bmodel\.([\w.]+)\.lifted_tensor", text)
        names = found[1].split(".") if found else []
        paths = [".".join(names[:count]) for count in range(len(names), 0, -1)]
        return [path for path in paths if path in self.modules]

    def around(self, frames: Iterable[FrameType]) -> list[str]:
        """The modules whose methods run in frames; tracing runs proxies that share their attributes."""
        paths = {id(module.__dict__): path for path, module in reversed(self.modules.items())}
        found = [paths.get(id(attributes_of(frame.f_locals.get("self")))) for frame in frames]
        return [path for path in dict.fromkeys(found) if path]


def told(calls: Sequence[Opaque]) -> list[str]:
    """Which modules are called as they are, and why: a line for each cause."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for call in calls:
        groups.setdefault((type(call.module).__name__, call.cause), {})[call.place] = None
    return [
        f"{_listed([*places])} ({kind}) cannot be traced{cause}. What cannot be traced is called as it is, "
        "at every step that computes it"
        for (kind, cause), places in groups.items()
    ]


def _listed(places: list[str]) -> str:
    if len(places) == 1:
        return named(places[0])
    patterns = [*Counter(re.sub(r"\d+", "*", place) for place in places)]
    others = f" and {len(patterns) - _NAMED} more" if len(patterns) > _NAMED else ""
    return f"{len(places)} modules {', '.join(map(repr, patterns[:_NAMED]))}{others}"


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for table in module._parameters, module._buffers:
        yield from ((name, value) for name, value in table.items() if value is not None)


def _likeness(module: nn.Module) -> Any:
    """Equal for modules that presumably can or cannot be traced alike: switches and parts count, no sizes."""
    tensors = {(name, type(value), value.dtype) for name, value in _own_tensors(module)}
    switches = {(name, value) for name, value in vars(module).items() if isinstance(value, (bool, str))}
    parts = [(name, _likeness(part)) for name, part in module.named_children()]
    return type(module), tensors, switches, parts
