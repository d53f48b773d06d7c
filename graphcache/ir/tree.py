"""A call's arguments taken apart into tensors and what is around them, and put together again."""

import dataclasses
import enum
import functools
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.ir.attributes import attributes_of
from graphcache.ir.errors import CaptureError

INSTEAD_OF_A_CACHE = (
    "switch off the cache that it belongs to (use_cache=False, or whatever the model calls it), or let "
    "forward take and return its tensors, in tuples, lists, dicts, dataclasses or other plain objects"
)


@dataclass(frozen=True, slots=True)
class Leaf:
    """The place of a tensor."""

    index: int


@dataclass(frozen=True, slots=True)
class Record:
    """A dataclass or another plain object, of which the fields or attributes are filled in."""

    kind: type
    fields: dict[str, Any]


def is_record(value: Any) -> bool:
    """Whether it is a dataclass that its fields make up, or an object that its attributes do."""
    kind: Any = type(value)
    return _is_made_of_fields(value) or _is_plain(kind)


def _is_made_of_fields(value: Any) -> bool:
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return False
    fields = dataclasses.fields(value)
    others = set(attributes_of(value) or ()) - {field.name for field in fields}
    return not others and all(field.init for field in fields)


@functools.cache
def _is_plain(kind: Any) -> bool:
    """Whether all that objects of a class hold are attributes, and nothing stands between these and Python.

    What has parts in C, makes up attributes, or is called, iterated or entered is something else.
    """
    written = {name for parent in kind.__mro__[:-1] for name in vars(parent)}
    return (
        bool(kind.__dictoffset__)
        and kind.__basicsize__ == _Plain.__basicsize__
        and not issubclass(kind, (torch.nn.Module, enum.Enum))
        and kind.__module__.partition(".")[0] not in sys.stdlib_module_names
        and written.isdisjoint(_BEYOND_ATTRIBUTES)
    )


class _Plain:
    """As large as an object that has nothing but attributes."""


_BEYOND_ATTRIBUTES = (
    "__new__", "__getattribute__", "__getattr__", "__setattr__", "__reduce__", "__reduce_ex__",
    "__getstate__", "__del__", "__call__", "__next__", "__enter__", "__torch_function__",
)  # fmt: skip


def fields_of(record: Any) -> dict[str, Any]:
    """What a dataclass or a plain object holds, by name."""
    if _is_made_of_fields(record):
        return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return dict(vars(record))


def made_anew(kind: Any, fields: dict[str, Any]) -> Any:
    """A dataclass or a plain object that holds this."""
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else None
    if [*fields] == names:
        return kind(**fields)
    made = object.__new__(kind)
    vars(made).update(fields)
    return made


def strip(value: Any, where: str, names: list[str], numbers: Collection[str] = ()) -> Any:
    """An argument with leaves in the place of its tensors, whose names are appended to `names`.

    `numbers` are the paths of numbers that are leaves too.
    """
    if isinstance(value, torch.Tensor) or where in numbers:
        names.append(where)
        return Leaf(len(names) - 1)
    if is_record(value):
        return Record(type(value), _stripped(fields_of(value), where, names, numbers))
    if isinstance(value, dict):
        return _stripped(value, where, names, numbers)
    if isinstance(value, (list, tuple)):
        items = [strip(item, f"{where}[{i}]", names, numbers) for i, item in enumerate(value)]
        return sequence_of(type(value), items)
    return value


def _stripped(
    entries: dict[str, Any], where: str, names: list[str], numbers: Collection[str]
) -> dict[str, Any]:
    return {key: strip(item, f"{where}.{key}", names, numbers) for key, item in entries.items()}


def fill(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """An argument made anew, with tensors in the place of its leaves."""
    return changed(value, lambda item, _: tensors[item.index] if isinstance(item, Leaf) else item, made_anew)


def changed(
    value: Any,
    change: Callable[[Any, str], Any],
    record: Callable[[Any, dict[str, Any]], Any] = Record,
    where: str = "",
) -> Any:
    """An argument's template with other leaves: what `change` makes of each, and of its path.

    Args:
        value: the template, or a part of it.
        change: given leaves, and what else is no container.
        record: puts an object together of its class and its fields.
        where: the part's own path.
    """

    def entries(found: dict[str, Any]) -> dict[str, Any]:
        return {key: changed(item, change, record, f"{where}.{key}") for key, item in found.items()}

    if isinstance(value, dict):
        return entries(value)
    if isinstance(value, (list, tuple)):
        items = [changed(item, change, record, f"{where}[{i}]") for i, item in enumerate(value)]
        return sequence_of(type(value), items)
    return record(value.kind, entries(value.fields)) if isinstance(value, Record) else change(value, where)


Taken = tuple[tuple[tuple[Any, ...], tuple[int, ...]], ...]
"""What forward takes out of lists in its arguments: the keys that lead to each, and the items it leaves."""


def taken(where: str, before: Any, after: Any, keys: tuple[Any, ...]) -> Taken:
    """Compare an argument with what forward left of it.

    It is made anew for the graph alone, so that nobody would see what forward puts into it.

    Raises:
        CaptureError: forward has changed it, and not by taking items out of a list.
    """
    if is_record(before):
        before, after = fields_of(before), fields_of(after)
    inner: Sequence[Any] = ()
    if isinstance(before, dict):
        inner, same = [*before], [*before] == [*after]
    elif isinstance(before, (list, tuple)):
        left = _left(before, after)
        if left is not None and isinstance(before, list):
            return ((keys, left),)
        inner, same = range(len(before)), len(before) == len(after)
    else:
        same = before is after
    if not same:
        raise CaptureError(
            f"the model's forward changes its argument {where}, which only its first step would do; return "
            f"the tensors instead. If it is a cache of keys and values, {INSTEAD_OF_A_CACHE}"
        )
    return tuple(one for key in inner for one in taken(where, before[key], after[key], (*keys, key)))


def _left(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, ...] | None:
    """The places of the items that are left where some were taken out, and nothing else was done."""
    left: list[int] = []
    for place, item in enumerate(before):
        if len(left) < len(after) and after[len(left)] is item:
            left.append(place)
    return tuple(left) if len(left) == len(after) < len(before) else None


def take(taken: Taken, arguments: Any) -> None:
    """Take out of a call's arguments what forward would take out of them.

    Raises:
        CaptureError: such a list stands in the arguments twice, and the graph knows of one.
    """
    for keys, left in taken:
        items = arguments
        for key in keys:
            items = (fields_of(items) if is_record(items) else items)[key]
        if _times(arguments, items) > 1:
            raise CaptureError(
                f"the model's forward takes items out of its argument {keys[0]}, a list passed twice; "
                "pass a copy"
            )
        items[:] = [items[place] for place in left]


def _times(value: Any, wanted: Any) -> int:
    """How often an object stands in another."""
    inner = fields_of(value) if is_record(value) else value
    if not isinstance(inner, (dict, list, tuple)):
        return 0
    items = inner.values() if isinstance(inner, dict) else inner
    return sum((item is wanted) + _times(item, wanted) for item in items)


def sequence_of(kind: type, items: list[Any]) -> Any:
    """A list or tuple of this kind."""
    return kind(*items) if hasattr(kind, "_fields") else kind(items)
