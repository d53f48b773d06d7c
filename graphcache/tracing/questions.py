"""Calls by which a model learns values of tensors: as numbers in Python, or as sizes of results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]
Function = Callable[..., Any]


class Kind(Protocol):
    """How one kind of call is answered with what a real one found out.

    `asked` are the tensors whose values a call asks for, none if this one asks for nothing. `noted` is what
    a real call finds out: numbers, and tensors in lists. `answered` makes the call with that in the place of
    the values.
    """

    def asked(self, args: Arguments, kwargs: Keywords) -> list[Tensor]: ...

    def noted(self, func: Function, args: Arguments, kwargs: Keywords) -> Any: ...

    def answered(self, func: Function, args: Arguments, kwargs: Keywords, note: Any) -> Any: ...


@dataclass(frozen=True)
class Value:
    """The result is a number, which is handed out as it was."""

    def asked(self, args: Arguments, kwargs: Keywords) -> list[Tensor]:
        return list(_tensors((args, kwargs)))

    def noted(self, func: Function, args: Arguments, kwargs: Keywords) -> Any:
        return func(*args, **kwargs)

    def answered(self, func: Function, args: Arguments, kwargs: Keywords, note: Any) -> Any:
        return note


@dataclass(frozen=True)
class Constant:
    """The result is made of tensors whose sizes depend on values, and which hold nothing else.

    `only` says which calls are of that kind.
    """

    only: Callable[[Arguments, Keywords], bool] = lambda args, kwargs: True

    def asked(self, args: Arguments, kwargs: Keywords) -> list[Tensor]:
        return list(_tensors((args, kwargs))) if self.only(args, kwargs) else []

    def noted(self, func: Function, args: Arguments, kwargs: Keywords) -> Any:
        return func(*args, **kwargs)

    def answered(self, func: Function, args: Arguments, kwargs: Keywords, note: Any) -> Any:
        return note.clone() if isinstance(note, Tensor) else type(note)([part.clone() for part in note])


@dataclass(frozen=True)
class AmongArguments:
    """Tensors stand among the arguments, from `first` on, for sizes or numbers.

    `nested`: only those within lists; a tensor by itself is no number there.
    """

    first: int = 1
    nested: bool = False

    def asked(self, args: Arguments, kwargs: Keywords) -> list[Tensor]:
        named = [item for name, item in kwargs.items() if name not in _OPERANDS]
        return [tensor for item in (*args[self.first :], *named) for tensor in self._numbers(item)]

    def _numbers(self, item: Any) -> Iterator[Tensor]:
        return iter(()) if self.nested and isinstance(item, Tensor) else _tensors(item)

    def noted(self, func: Function, args: Arguments, kwargs: Keywords) -> Any:
        return [tensor.tolist() for tensor in self.asked(args, kwargs)]

    def answered(self, func: Function, args: Arguments, kwargs: Keywords, note: Any) -> Any:
        numbers = iter(note)

        def numbered(item: Any) -> Any:
            return item if self.nested and isinstance(item, Tensor) else _numbered(item, numbers)

        rest = [numbered(item) for item in args[self.first :]]
        named = {name: item if name in _OPERANDS else numbered(item) for name, item in kwargs.items()}
        return func(*args[: self.first], *rest, **named)


@dataclass(frozen=True)
class Indexed:
    """A mask among indices chooses places; a tensor without dimensions is an index, or a bound of a slice."""

    def asked(self, args: Arguments, kwargs: Keywords) -> list[Tensor]:
        found = [item for item in _indices(args) if isinstance(item, (Tensor, slice))]
        return [item for item in _tensors(found) if _is_mask(item) or not item.dim()]

    def noted(self, func: Function, args: Arguments, kwargs: Keywords) -> Any:
        return [_meaning(item) for item in self.asked(args, kwargs)]

    def answered(self, func: Function, args: Arguments, kwargs: Keywords, note: Any) -> Any:
        notes = iter(note)
        places: list[Any] = []
        for item in _indices(args):
            if isinstance(item, Tensor) and item.dim() and _is_mask(item):
                places += next(notes)
            elif isinstance(item, slice) or (isinstance(item, Tensor) and not item.dim()):
                places.append(_numbered(item, notes))
            else:
                places.append(item)
        return func(args[0], tuple(places), *args[2:], **kwargs)


@dataclass(frozen=True)
class Selected:
    """`masked_select`: the elements at a mask's places."""

    def asked(self, args: Arguments, kwargs: Keywords) -> list[Tensor]:
        return [_named(_SELECT, args, kwargs)["mask"]]

    def noted(self, func: Function, args: Arguments, kwargs: Keywords) -> Any:
        return _places(_selected(args, kwargs)[1])

    def answered(self, func: Function, args: Arguments, kwargs: Keywords, note: Any) -> Any:
        return _selected(args, kwargs)[0][tuple(note)]


@dataclass(frozen=True)
class Repeated:
    """`repeat_interleave` with counts: the rows that they name, each so many times."""

    def asked(self, args: Arguments, kwargs: Keywords) -> list[Tensor]:
        given = _named(_REPEATS, args, kwargs)
        counts = given.get("repeats", given["input"])
        return [counts] if isinstance(counts, Tensor) and kwargs.get("output_size") is None else []

    def noted(self, func: Function, args: Arguments, kwargs: Keywords) -> Any:
        given = _named(_REPEATS, args, kwargs)
        value, dim = given["input"], given.get("dim")
        if "repeats" not in given:
            return [func(*args, **kwargs)]
        rows = value.numel() if dim is None else value.shape[dim]
        return [torch.repeat_interleave(given["repeats"].expand(rows))]

    def answered(self, func: Function, args: Arguments, kwargs: Keywords, note: Any) -> Any:
        given = _named(_REPEATS, args, kwargs)
        value, dim = given["input"], given.get("dim")
        if "repeats" not in given:
            return note[0].clone()
        return value.flatten()[note[0]] if dim is None else value.index_select(dim, note[0])


_OPERANDS = ("input", "self", "tensor", "out")
"""Names of tensors that are no numbers."""
_SELECT = ("input", "mask")
_REPEATS = ("input", "repeats", "dim")


def _selected(args: Arguments, kwargs: Keywords) -> Sequence[Tensor]:
    """What `masked_select` is given, in one shape."""
    given = _named(_SELECT, args, kwargs)
    both: Any = torch.broadcast_tensors
    return list(both(given["input"], given["mask"]))


def _named(names: Sequence[str], args: Arguments, kwargs: Keywords) -> dict[str, Any]:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given | {"input": given.get("input", given.get("self"))}


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those within tuples, lists, dicts and slices, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, slice):
        yield from _tensors([value.start, value.stop, value.step])


def _numbered(value: Any, numbers: Iterator[Any]) -> Any:
    """The same with numbers in the place of tensors."""
    if isinstance(value, Tensor):
        return next(numbers)
    if isinstance(value, slice):
        return slice(*[_numbered(bound, numbers) for bound in (value.start, value.stop, value.step)])
    if isinstance(value, (list, tuple)):
        return type(value)([_numbered(item, numbers) for item in value])
    return value


def _indices(args: Arguments) -> Arguments:
    index = args[1] if len(args) > 1 else ()
    return index if isinstance(index, tuple) else (index,)


def _meaning(index: Tensor) -> Any:
    """The places of a mask, or an index as a number; a mask without dimensions is a truth."""
    if index.dim():
        return _places(index)
    return bool(index) if _is_mask(index) else index.item()


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _places(mask: Tensor) -> list[Tensor]:
    return list(mask.nonzero(as_tuple=True))


def _is_where(args: Arguments, kwargs: Keywords) -> bool:
    """Whether `where` is given a condition alone, whose places it finds."""
    return len(args) + len(kwargs) == 1


def _counts_classes(args: Arguments, kwargs: Keywords) -> bool:
    """Whether `one_hot` takes as many classes as the values need."""
    return bool(kwargs.get("num_classes", [*args, -1, -1][1]) == -1)


_FOUND: tuple[tuple[Kind, tuple[Any, ...], str], ...] = (
    (
        Value(),
        (Tensor, torch),
        "item __bool__ __int__ __float__ __complex__ __index__ __contains__ is_nonzero equal allclose",
    ),
    (Constant(), (Tensor, torch), "nonzero argwhere unique unique_consecutive bincount"),
    (Constant(_is_where), (torch,), "where"),
    (Constant(_counts_classes), (F,), "one_hot"),
    (Indexed(), (Tensor, torch), "__getitem__ __setitem__ index_put index_put_"),
    (Selected(), (Tensor, torch), "masked_select"),
    (Repeated(), (Tensor, torch), "repeat_interleave"),
    (AmongArguments(0), (torch,), "arange zeros ones empty full linspace eye"),
    (AmongArguments(0, nested=True), (torch,), "tensor as_tensor"),
    (
        AmongArguments(),
        (Tensor, torch, F),
        "view reshape narrow expand repeat tile roll split split_with_sizes tensor_split chunk unflatten "
        "select new_zeros new_ones new_empty new_full broadcast_to pad",
    ),
)

KINDS: Mapping[Any, Kind] = {
    getattr(home, name): kind
    for kind, homes, names in _FOUND
    for name in names.split()
    for home in homes
    if hasattr(home, name)
}
"""Of PyTorch's functions and methods, those that ask for values."""
