"""Why a model cannot be captured, in words for its author."""

import os
import re
import sysconfig
import traceback
from typing import Any

import torch

from graphcache.libraries.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_OWN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_STANDARD = os.path.join(sysconfig.get_path("stdlib"), "")
_UNKNOWN = re.compile(r"\bz?u[uf]?\d+\b|\bSym(Int|Float|Bool)\b")
"""How PyTorch names numbers that depend on values."""
_NO_MEMORY = re.compile(r"data pointer|\.numpy\(\)|data is not allocated|'meta' device|meta tensor")


class Stopped(Exception):
    """What a model's forward raised while it was traced is its cause.

    PyTorch writes the graph so far to the error stream if the exception takes it; this one does not.
    """

    @property
    def partial_fx_graph(self) -> Any:
        raise AttributeError

    @partial_fx_graph.setter
    def partial_fx_graph(self, graph: Any) -> None:
        pass


def explain(error: BaseException) -> str:
    """What went wrong while a model was traced that can be called, the line of it that did, and what to do.

    The line is the innermost one that belongs neither to PyTorch nor to Python's own library.
    """
    is_own = isinstance(error, Stopped)
    return f"the model cannot be captured{because(error)}. {_advice(_raised(error), is_own)}"


def because(error: BaseException) -> str:
    """The line of a model that failed while it was traced, and what was said there."""
    error = _raised(error)
    return f"{user_line(error)}: {_reason(error)}"


def _is_on_values(error: BaseException) -> bool:
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException
    return isinstance(error, kinds)


def _raised(error: BaseException) -> BaseException:
    return error.__cause__ or error if isinstance(error, Stopped) else error


BRANCHES = (
    "A step must not branch on tensor values, nor make sizes of them; move that decision out of forward, or "
    "use operations that keep the size, such as torch.where and masks"
)


def _advice(error: BaseException, is_own: bool) -> str:
    text = str(error)
    if _is_on_values(error) or _UNKNOWN.search(text):
        return BRANCHES
    if isinstance(error, UnsupportedOperatorException):
        return (
            "That operator does not say what its results look like: register that with "
            "torch.library.register_fake"
        )
    if _NO_MEMORY.search(text):
        return (
            "Tensors have no values while they are traced: compute with tensor operations, or wrap what "
            "needs the values in an operator of its own (torch.library.custom_op)"
        )
    if is_own:
        return (
            "It can be called, but not be traced with tensors that have no values; forward must not ask "
            "what kind of tensor it is given"
        )
    return "The model can be called, but torch.export cannot trace it: this is a limit of PyTorch's"


def _reason(error: BaseException) -> str:
    """The first line of what PyTorch or the model says, and who says it."""
    text = re.split(r"\n| \(unhinted| If you're using", str(error).strip())[0].removesuffix(".")
    kind = type(error).__name__
    return text if _is_on_values(error) and text else f"{kind}: {text}" if text else kind


def user_line(error: BaseException) -> str:
    """The innermost frame of the user's own code behind an export error."""
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        frames = [f for f in traceback.extract_tb(chain.__traceback__) if is_user_code(f.filename)]
        if frames:
            last = frames[-1]
            return f" because of {last.filename}:{last.lineno} in {last.name}: `{last.line}`"
        chain = chain.__cause__ or chain.__context__
    return ""


def is_user_code(filename: str) -> bool:
    if filename.startswith((_TORCH, _OWN, "<")):
        return False
    return "site-packages" in filename or not filename.startswith(_STANDARD)
