"""A timestep that the caller gives as a number: whether a model computes the same with it as a tensor."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import same_bits
from graphcache.ir.tree import Taken
from graphcache.tracing.explanation import user_line
from graphcache.tracing.rehearsal import random_states_kept

_OTHERWISE = 0.99990123
"""Makes another time nearby, one that no short binary fraction holds: rounding shows with it."""


class AsNumbers(TorchFunctionMode):
    """Within it, `torch.tensor` takes these tensors for the numbers that they stand for."""

    def __init__(self, numbers: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._numbers = {id(number): number for number in numbers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and self._numbers and args:
            items = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            if items and all(id(item) in self._numbers for item in items):
                return self._made(args[0], items, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _made(
        self, data: Any, items: Sequence[torch.Tensor], dtype: Any = None, device: Any = None, **_: Any
    ) -> torch.Tensor:
        whole = torch.stack(list(items))
        if dtype is None:
            dtype = torch.get_default_dtype() if whole.is_floating_point() else whole.dtype
        made = whole.to(device or torch.get_default_device(), dtype)
        return made if isinstance(data, (list, tuple)) else made[0]


def run_as_tensors(
    call: CallSpec, model: Callable[..., Any], tensors: Sequence[torch.Tensor]
) -> tuple[Any, Taken]:
    """What `CallSpec.run` gives for these leaves, those that stand for numbers included."""
    if not call.numbers:
        return call.run(model, tensors)
    with AsNumbers([tensors[index] for index in call.numbers]):
        return call.run(model, tensors)


def refuse_unlike_numbers(call: CallSpec, model: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> None:
    """Call the model with numbers and with tensors in their place.

    Raises:
        CaptureError: the results differ in a bit, or the model takes no tensors there.
    """
    given = list(tensors)
    for index in call.numbers:
        moved = tensors[index] * _OTHERWISE if tensors[index].is_floating_point() else tensors[index]
        given[index] = moved
    numbers: list[Any] = list(given)
    for index in call.numbers:
        numbers[index] = given[index].item()
    with random_states_kept(tensor.device for tensor in tensors):
        expected = OutputSpec.of(*call.run(model, numbers))[1]
    try:
        found = OutputSpec.of(*run_as_tensors(call, model, given))[1]
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{named_numbers(call)}, which forward takes as a number only{user_line(error)}: "
            f"{type(error).__name__}: {error}. {ADVICE}"
        ) from error
    if len(found) != len(expected) or not all(map(same_bits, found, expected)):
        raise CaptureError(f"{named_numbers(call)}, with which forward computes other bits. {ADVICE}")


ADVICE = (
    "Pass the timestep as a tensor, and compute what depends on it with tensor operations, not with `math`, "
    "`float()` or comparisons; a number in its place would be captured anew at each step"
)


def about_numbers(call: CallSpec) -> str:
    """What to add to a reason why a call cannot be captured, as a sentence, if there are numbers."""
    return f" Besides, {named_numbers(call)}. {ADVICE}" if call.numbers else ""


def named_numbers(call: CallSpec) -> str:
    """What was made of the numbers, as the beginning of a sentence."""
    names = ", ".join(call.leaf_names[index] for index in call.numbers)
    return f"the timestep {names} is a number; a graph gets it as a tensor without dimensions"
