"""What a program is made for besides a model: a signature, and the modes around the call."""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from graphcache.compiler.decisions import bare
from graphcache.ir.call import Key
from graphcache.ir.errors import CaptureError, StateError
from graphcache.libraries.diffusers_private import attention_backend
from graphcache.libraries.kernels import attention_kernels
from graphcache.libraries.torch_private import FakeTensor


def ambient() -> tuple[Hashable, ...]:
    """What tracing and compiled code depend on besides the arguments."""
    return *around_code(), attention_backend(), torch.is_grad_enabled()


def around_code() -> tuple[Hashable, ...]:
    """Of that what has a part in native code without gradients: autocast, and attention's kernels."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    dtypes: tuple[torch.dtype, ...] = ()
    if any(autocast):
        devices = itertools.compress(("cpu", "cuda"), autocast)
        dtypes = tuple(map(torch.get_autocast_dtype, devices))
    return autocast, dtypes, attention_kernels()


def refuse_export(tensors: Sequence[torch.Tensor]) -> None:
    """Raise CaptureError if the call is itself traced by an export."""
    if torch.compiler.is_exporting() and any(isinstance(tensor, FakeTensor) for tensor in tensors):
        raise CaptureError(
            "a transformed model cannot be exported, since its steps are different graphs; export the "
            "original, graphcache.restore(model)"
        )


def refuse_conversion(before: Key, after: Key) -> None:
    """Raise StateError if inputs have another dtype or device than those of the step before."""
    old, new = _kinds(before), _kinds(after)
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            raise StateError(
                f"argument {name} changed from {old[name]} to {new[name]} in the middle of a generation; "
                "call model.reset() if this is another one"
            )


def what_changed(before: Key, after: Key) -> str:
    """In which way two calls of a generation differ, for a message."""
    if bare(before) == bare(after):
        return "what forward asks of its inputs' values, such as a mask's length,"
    names = _other_numbers(before, after)
    if not names:
        return "another form of the model, or inputs of other sizes,"
    return (
        f"argument {', '.join(names)} is a number, of which each value is captured by itself (pass it as a "
        "tensor if it changes from step to step, or name it with transform(..., timestep=...) if it tells "
        "the time), and is another one"
    )


def _other_numbers(before: Key, after: Key) -> list[str]:
    """The arguments in which two signatures differ, if it is by numbers alone."""
    found: dict[str, None] = {}
    argument = ""
    for old, new in zip(before, after, strict=False):
        argument = old if isinstance(old, str) else argument
        if old != new:
            if not (_is_number(old) and _is_number(new)):
                return []
            found[argument] = None
    return list(found) if len(before) == len(after) else []


def _is_number(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and item[0] in (int, float)


def _kinds(key: Any) -> dict[str, str]:
    """Dtype and device of each named tensor of a signature."""
    pairs = itertools.pairwise(key)
    return {
        name: f"{item[1]} on {item[2]}"
        for name, item in pairs
        if isinstance(name, str) and isinstance(item, tuple) and item and isinstance(item[0], torch.Size)
    }
