"""Whether a module may be called in the middle of a graph: it computes its results and does nothing else."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from graphcache.ir.graph import layout, same_bits
from graphcache.ir.opaque import Opaque, describe_layouts, known, opaque_call
from graphcache.ir.versions import memory
from graphcache.libraries.torch_private import CPU_ATTENTION, FLASH_ATTENTION, TorchDispatchMode
from graphcache.tracing.opaque import PLAIN, Invocation, OpaqueCall, Unfit, kind_of, taken_apart
from graphcache.tracing.rehearsal import Writes

_COUNTS: dict[Any, Any] = {
    **flop_registry,
    CPU_ATTENTION.overloadpacket: flop_registry[FLASH_ATTENTION.overloadpacket],
}
"""What operations take, by PyTorch's formulas; its own counter fails where gradients are computed."""
_NOTHING = (object(),)


class Impure(Exception):
    """A module does more than compute its results, and so does every one around it."""


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = _COUNTS.get(getattr(func, "overloadpacket", None))
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result


class _Attention(TorchFunctionMode):
    """Whether PyTorch's attention is asked for."""

    is_met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.is_met = self.is_met or func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def observed(
    place: str,
    cause: str,
    invocation: Invocation,
    tensors: Sequence[Tensor],
    call: Callable[[], Any],
    held: Mapping[int, str],
) -> tuple[Opaque | Exception, Any]:
    """Make a call for its caller, and once more to see what it does besides.

    Args:
        place: the module's path.
        cause: why it is not traced.
        invocation: the call, and
        tensors: what it is given.
        call: makes it as the caller wants it.
        held: the memory of the tensors that the model holds, with their paths.

    Returns:
        What was seen, or why the module cannot stand in a graph, Unfit or Impure; and the caller's result.
    """
    module = invocation.module
    copies = [tensor.clone() for tensor in tensors]
    buffers = [(name, buffer, buffer.clone()) for name, buffer in module.named_buffers()]
    result = call()
    before = _state(module)
    try:
        template, first = taken_apart(result)
        if not all(map(same_bits, tensors, copies)):
            raise Unfit("changes its arguments in place")
        second, flops, attends = _again(invocation, template, first, tensors, held)
        _refuse_traces(place, buffers, before, _state(module))
        _refuse_other_sizes(invocation, template, first, copies)
        of_both = {memory(tensor) for tensor in first} & {memory(tensor) for tensor in second}
        made = OpaqueCall(
            place=place,
            cause=cause,
            module=module,
            flops=flops or _linear_flops(module, first),
            attends=attends,
            described=describe_layouts(first),
            invocation=invocation,
            template=template,
            layouts=tuple(map(layout, first)),
            kept=frozenset(i for i, tensor in enumerate(first) if memory(tensor) in of_both),
            weights=tuple(name for name, weight in module.named_parameters() if _is_trained(weight)),
        )
        _refuse_failing(known(made), tensors, first)
    except (Unfit, Impure) as error:
        return error, result
    return known(made), result


def _linear_flops(module: nn.Module, results: Sequence[Tensor]) -> int:
    """Of a linear layer whose kernels PyTorch cannot count."""
    return 2 * module.in_features * results[0].numel() if isinstance(module, nn.Linear) else 0


def _refuse_traces(
    place: str,
    buffers: Sequence[tuple[str, Tensor, Tensor]],
    before: Mapping[str, Sequence[Any]],
    after: Mapping[str, Sequence[Any]],
) -> None:
    """Calls must leave the values of buffers, and a second one all attributes, as they were before it."""
    for name, buffer, copy in buffers:
        if not same_bits(buffer, copy):
            raise Impure(f"changes '{place}.{name}'")
    for name in before.keys() | after.keys():
        if not _is_kept(before.get(name, _NOTHING), after.get(name, _NOTHING)):
            raise Impure(f"keeps '{place}.{name}' from call to call")


def _again(
    invocation: Invocation,
    template: Any,
    first: Sequence[Tensor],
    tensors: Sequence[Tensor],
    held: Mapping[int, str],
) -> tuple[list[Tensor], int, bool]:
    """The results of another call, and what it takes.

    Raises:
        Impure: it is not the same, or leaves traces.
    """
    writes, work, attention, random = Writes(), _Work(), _Attention(), _random_states(tensors)
    try:
        with writes, work, attention:
            again, second = invocation.run([tensor.detach() for tensor in tensors])
        if again != template or [*map(layout, second)] != [*map(layout, first)]:
            raise Unfit("returns another structure when it is called again")
        if not all(map(same_bits, first, second)):
            raise Impure("computes other bits when it is called again with the same inputs")
    except (Unfit, Impure):
        raise
    except Exception as error:
        raise Impure(f"fails when it is called again ({type(error).__name__}: {error})") from error
    finally:
        written = {memory(tensor) for tensor in writes.written} - {memory(tensor) for tensor in tensors}
        writes.undo()
    if not all(map(torch.equal, random, _random_states(tensors))):
        raise Impure("draws random numbers")
    for place in written & held.keys():
        raise Impure(f"changes '{held[place]}'")
    return second, work.flops, attention.is_met


def _refuse_failing(call: Opaque, tensors: Sequence[Tensor], first: Sequence[Tensor]) -> None:
    """The call must do as an operation of a graph what it does by itself, such as compile code."""
    try:
        results = opaque_call(call, [*tensors], [])
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        raise Impure(f"fails within an operation ({type(error).__name__}: {text})") from error
    if not all(map(same_bits, results, first)):
        raise Impure("computes other bits within an operation")


def _refuse_other_sizes(
    invocation: Invocation, template: Any, first: Sequence[Tensor], tensors: Sequence[Tensor]
) -> None:
    """Other values must not lead to results of other sizes; whether they make sense does not matter."""
    writes, made = Writes(), torch.Generator().manual_seed(0)
    try:
        with writes:
            again, others = invocation.run([_otherwise(tensor, made) for tensor in tensors])
    except Unfit:
        raise
    except Exception:
        return
    finally:
        writes.undo()
    if again != template or [*map(kind_of, others)] != [*map(kind_of, first)]:
        raise Unfit("returns tensors whose sizes depend on values")


def _otherwise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of the same kind with other values, indices and masks in another order."""
    if not tensor.is_floating_point():
        return tensor.flatten().flip(0).view(tensor.shape)
    return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)


def _state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """The attributes of a module and its parts, each with what it holds if that is a container."""
    return {
        f"{path}.{name}".lstrip("."): (value, *_items(value))
        for path, part in module.named_modules()
        for name, value in [*vars(part).items()]
    }


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return [*value] if isinstance(value, (list, tuple, set)) else ()


def _is_kept(before: Sequence[Any], after: Sequence[Any]) -> bool:
    return len(before) == len(after) and all(
        one is other or (isinstance(one, PLAIN) and type(one) is type(other) and one == other)
        for one, other in zip(before, after, strict=True)
    )


def held_memory(model: nn.Module) -> dict[int, str]:
    """The memory of every tensor that a module of the model holds, with its path."""
    return {
        memory(value): f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, value in _tensors_of(module)
    }


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in chain([*vars(module).items()], module._parameters.items(), module._buffers.items()):
        items = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
        yield from ((name, item) for item in items if isinstance(item, Tensor))


def _is_trained(weight: nn.Parameter) -> bool:
    return type(weight) is nn.Parameter and weight.requires_grad


def _random_states(tensors: Sequence[Tensor]) -> list[Tensor]:
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
