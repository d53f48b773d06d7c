"""Calls of one signature told apart by what forward decides on: the values that it asks for."""

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphcache.compiler.guidance_half import Rows
from graphcache.ir.call import Key
from graphcache.ir.versions import version
from graphcache.tracing.conditions import Conditions

_STAMPS = 32
"""Inputs that are known again without a look at their values."""
_KNOWN = 256
"""Values of one signature that are known again."""


@dataclass(frozen=True, slots=True)
class Values:
    """In a program's key: under which number the values are known that it was captured for."""

    number: int


class Decisions:
    """Completes the keys of programs. Models whose forward asks for nothing have keys that are complete."""

    def __init__(self) -> None:
        self._signatures: dict[Key, _Signature] = {}

    def __bool__(self) -> bool:
        return bool(self._signatures)

    def completed(self, key: Key, tensors: Sequence[torch.Tensor], begins: bool = False) -> Key:
        """A key with the number of a call's values; other values than any before have a new number.

        Args:
            key: of the program, with or without a number.
            tensors: the call's leaves.
            begins: whether a generation begins, at which also those are looked at that keep no version.
        """
        key = bare(key)
        signature = self._signatures.get(_shared(key))
        number = signature.number(tensors, begins) if signature is not None else 0
        return (*key[:-1], Values(number), key[-1]) if number else key

    def note(
        self, key: Key, conditions: Conditions, tensors: Sequence[torch.Tensor], rows: Rows | None = None
    ) -> Key:
        """Remember what a program's capture takes for granted, and tell the program's key from now on.

        `rows`: of the half that was captured beside it.
        """
        signature = self._signatures.setdefault(_shared(bare(key)), _Signature())
        number = key[-2].number if isinstance(key[-2], Values) else 0
        if not number and rows is None:
            number = next(signature.numbers)
        if not number or rows is None or number in signature.checks:
            signature.note(number, conditions, rows)
        return self.completed(key, tensors)

    def knows(self, key: Key) -> bool:
        """Whether forward has asked for values in calls of this signature."""
        return _shared(bare(key)) in self._signatures

    def forget_others(self, variants: set[int]) -> None:
        """Drop what is known of all forms of the model but these."""
        for key in [key for key in self._signatures if key[0] not in variants]:
            del self._signatures[key]


@dataclass
class _Signature:
    """The values that are known of one signature, by their numbers.

    Each number has conditions of all inputs, or of their rows that a half is captured for, or of both.
    Threads look while another one notes, so that what is known is replaced and never changed.
    """

    checks: dict[int, Mapping[Rows | None, Conditions]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    leaves: tuple[int, ...] = ()
    reads_weights: bool = False
    stamps: "dict[tuple[int, ...], _Stamp]" = field(default_factory=dict)

    def note(self, number: int, conditions: Conditions, rows: Rows | None) -> None:
        known = {**self.checks, number: {**self.checks.get(number, {}), rows: conditions}}
        self.checks = dict(list(known.items())[-_KNOWN:])
        self.leaves = tuple(sorted({*self.leaves, *conditions.leaves}))
        self.reads_weights = self.reads_weights or conditions.reads_weights
        self.stamps = {}

    def number(self, tensors: Sequence[torch.Tensor], begins: bool) -> int:
        asked = [tensors[index] for index in self.leaves]
        place = tuple(map(id, asked))
        stamp = self.stamps.get(place)
        if stamp is not None and not stamp.is_of(asked):
            stamp = None
        if stamp is not None and not (begins and (self.reads_weights or -1 in stamp.versions)):
            return stamp.number
        number = self._found(tensors)
        if number is None and stamp is not None and stamp.number not in self.checks:
            number = stamp.number
        if number is None:
            number = next(self.numbers)
        stamps = self.stamps
        self.stamps = {**stamps, place: _Stamp.of(asked, number)} if len(stamps) < _STAMPS else {}
        return number

    def _found(self, tensors: Sequence[torch.Tensor]) -> int | None:
        looks: dict[tuple[str, Rows | None], _Look] = {}
        for number, checks in self.checks.items():
            for rows, conditions in checks.items():
                key = conditions.structure, rows
                if key not in looks:
                    given = tensors if rows is None else rows.inputs(tensors)
                    looks[key] = _Look(conditions.found(given))
                if not looks[key].finds(conditions.expected):
                    break
            else:
                return number
        return None


@dataclass
class _Look:
    """Values that are computed as far as they are wanted."""

    rest: Iterator[bytes]
    values: list[bytes] = field(default_factory=list)

    def finds(self, expected: Sequence[bytes]) -> bool:
        """Whether the first of them are as expected, each looked at only if those before it are."""
        for place, value in enumerate(expected):
            if place == len(self.values):
                self.values.append(next(self.rest))
            if self.values[place] != value:
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Stamp:
    """By which inputs are known again that were not written to."""

    tensors: tuple["weakref.ref[torch.Tensor]", ...]
    versions: tuple[int, ...]
    number: int

    @staticmethod
    def of(tensors: Sequence[torch.Tensor], number: int) -> "_Stamp":
        return _Stamp(tuple(map(weakref.ref, tensors)), tuple(map(version, tensors)), number)

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        return self.versions == tuple(map(version, tensors)) and all(
            held() is tensor for held, tensor in zip(self.tensors, tensors, strict=True)
        )


def bare(key: Key) -> Key:
    """A key without a number of values, which stands before the last item."""
    return (*key[:-2], key[-1]) if isinstance(key[-2], Values) else key


def _shared(key: Key) -> Key:
    """What a key has in common with that of the other gradient mode, which has the same capture."""
    return key[:-1]
