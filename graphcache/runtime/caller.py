"""The pipeline that calls a model: found on Python's stack, whoever made it and wherever it was sent."""

import functools
import operator
import sys
import weakref
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from types import CodeType, FrameType
from typing import Any

from torch import nn

from graphcache.ir.attributes import attributes_of
from graphcache.libraries.torch_private import MODULE_CALL

FARTHEST = 32
"""How many functions up the stack a pipeline is looked for; a loop outside of any pipeline pays for each."""

_MODULE_CALL = MODULE_CALL.__code__
_HELD_BY_FRAME = 3
"""References to the copy of a frame's variables while nobody else has it: the frame's, two of the reader."""


class Caller:
    """Finds the pipeline by which a model is called at present: what has both a scheduler and the model."""

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None

    def attach(self, model: nn.Module) -> None:
        """Look for what holds this model, itself or behind one module around it."""
        self._model = weakref.ref(model)

    def find(self, handed: bool = False, below: int | None = None) -> Any:
        """The pipeline of which a method calls, however far down; None outside of any.

        Args:
            handed: whether one that any calling function was given as an argument counts as well.
            below: the identity of the farthest frame that is looked at, if it is on the stack.
        """
        model = None if self._model is None else self._model()
        frame = None if model is None else _outside()
        for _ in range(FARTHEST):
            if frame is None:
                return None
            names = _names(frame.f_code, handed)
            pipe = _driving(frame, model, names) if names else None
            if pipe is not None or id(frame) == below:
                return pipe
            frame = frame.f_back
        return None


def _outside() -> FrameType | None:
    """The innermost function that is neither this library's nor the one by which every module is called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("graphcache."):
        frame = frame.f_back
    return frame.f_back if frame is not None and frame.f_code is _MODULE_CALL else frame


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType, handed: bool) -> tuple[str, ...]:
    """The arguments that may be a pipeline: all, or that whose method the function is."""
    if handed:
        return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    scope = code.co_qualname.rpartition(".")[0]
    is_method = scope and not scope.endswith("<locals>") and code.co_argcount
    return code.co_varnames[:1] if is_method else ()


def _driving(frame: FrameType, model: nn.Module | None, names: Sequence[str]) -> Any:
    """The one of a function's variables that has a scheduler and the model."""
    variables, found = frame.f_locals, None
    for name in names:
        value = variables.get(name)
        attributes = attributes_of(value)
        if attributes and _has_scheduler(value, attributes) and _holds(attributes, model):
            found = value
            break
    # before Python 3.13 the frame keeps this copy, and with it tensors that the function has let go;
    # one that someone asked for with locals() is theirs
    if type(variables) is dict and sys.getrefcount(variables) <= _HELD_BY_FRAME:
        variables.clear()
    return found


def _has_scheduler(value: Any, attributes: Mapping[str, Any]) -> bool:
    """Whether it has one that knows timesteps. Asks nothing that would compute an attribute it has not."""
    named = "scheduler" in attributes or hasattr(type(value), "scheduler")
    return named and hasattr(getattr(value, "scheduler", None), "timesteps")


def _holds(attributes: Mapping[str, Any], model: nn.Module | None) -> bool:
    """Whether the model is an attribute, or is inside one module that is, as behind torch.compile."""
    if any(map(operator.is_, attributes.values(), repeat(model))):
        return True
    modules = (item._modules.values() for item in [*attributes.values()] if isinstance(item, nn.Module))
    return any(map(operator.is_, chain.from_iterable(modules), repeat(model)))
