"""What a call computes: its operations with their numbers, in which two ways that agree by chance differ."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from graphcache.ir.graph import as_bytes, layout
from graphcache.ir.versions import memory, version
from graphcache.libraries.torch_private import OpOverload, TorchDispatchMode, tree_leaves
from graphcache.tracing.rehearsal import Effects

_MOVING = frozenset(
    """
    clone copy detach lift_fresh lift_fresh_copy _to_copy select_scatter slice_scatter diagonal_scatter
    as_strided_scatter
    """.split()  # noqa: SIM905
)
"""Operations that compute nothing: what is written in place one way is put together another way."""
_SHAPED = frozenset("empty_like zeros_like ones_like full_like rand_like randn_like".split())  # noqa: SIM905
"""Operations that read a tensor's shape alone, as all that are named new_something do."""
_ONE = (("1",), ("1.0",))
_LARGE = 1 << 20
"""From so many numbers on the values of a table do not count."""
_NUMBERS = (bool, int, float, complex, str)

Operation = tuple[Any, ...]


class Computation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is computed of some tensors within it.

    A clamp that does not bite, or a factor of zeros, leaves no bit in a result; here its number is seen. What
    is computed of weights and numbers alone does not count, but for its values where they meet the tensors:
    a model may keep it from one call to the next.

    Args:
        model: whose weights are known again by their memory.
        tensors: those that are given.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {memory(weight) for weight in (*model.parameters(), *model.buffers())}
        self._values: dict[int, int] = {}
        self._effects: dict[Any, Effects] = {}
        self._alive: list[Any] = []
        self._digests: dict[Any, bytes] = {}
        self._done: list[tuple[Operation | None, frozenset[int], int]] = []
        for tensor in tensors:
            self._is_new(tensor, 0)

    def of(self, results: Sequence[Tensor]) -> "Counter[Operation]":
        """The operations that these results depend on, each as often as it was run."""
        needed = {self._values[memory(result)] for result in results if memory(result) in self._values}
        found = Counter[Operation]()
        for operation, read, value in reversed(self._done):
            if value in needed:
                needed |= read
                if operation is not None:
                    found[operation] += 1
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types:  # tensors that are made of others say what is done with these
            return NotImplemented
        given = tree_leaves((args, kwargs))
        memories = {memory(item) for item in given if isinstance(item, Tensor)}
        read = frozenset(self._values[place] for place in memories if place in self._values)
        told = (*map(self._told, _counting(given)),) if read else ()
        result = func(*args, **kwargs)
        name = _name(func)
        if not read or name in _SHAPED or name.startswith("new_"):
            return result
        made = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        if func not in self._effects:
            self._effects[func] = Effects.of(func)
        written = [*self._effects[func].targets(args, kwargs)]
        if not written and memories.issuperset(map(memory, made)):
            return result
        shapes = tuple((item.dtype, item.shape) for item in made)
        value = len(self._done) + 1
        is_nothing = name in _MOVING or (name in ("mul", "div") and told[1:] in _ONE)
        self._done.append((None if is_nothing else (name, *told, shapes), read, value))
        for item in (*made, *written):
            self._is_new(item, value)
        return result

    def _is_new(self, tensor: Tensor, value: int) -> None:
        if memory(tensor) not in self._values:
            # no other memory is known by the same number as long as this is held, which holds no values
            self._alive.append(_held(tensor))
        self._values[memory(tensor)] = value

    def _told(self, item: Any) -> Any:
        """What an operation is given, by which it is known again."""
        if not isinstance(item, Tensor):
            return repr(item)
        if memory(item) in self._values:
            return item.shape
        looks = layout(item)
        if memory(item) in self._weights:
            return memory(item), item.storage_offset(), *looks
        if item.numel() > _LARGE or item.is_meta:
            return looks[:3]
        key = memory(item), version(item), item.storage_offset(), *looks
        if key not in self._digests:
            self._alive.append(_held(item))
            self._digests[key] = hashlib.sha256(as_bytes(item)).digest()
        return *looks[:3], self._digests[key]


def _held(tensor: Tensor) -> Any:
    """What keeps a tensor's memory from being known by another's number; one without memory keeps itself."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return tensor


def _counting(given: Sequence[Any]) -> Iterator[Any]:
    return (item for item in given if isinstance(item, (Tensor, *_NUMBERS)))


def _name(func: Any) -> str:
    return func.overloadpacket.__name__.rstrip("_") if isinstance(func, OpOverload) else str(func)
