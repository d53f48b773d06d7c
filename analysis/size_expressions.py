"""Which sizes of a graph follow from which others, told by several examples of all of them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Column = tuple[int, ...]
"""One size, in each of the examples."""


class Expression(NamedTuple):
    """A product of units times a number, a product divided by a number, or a sum."""

    kind: Literal["product", "quotient", "sum"]
    units: tuple[int, ...]
    number: int

    def of(self, units: Sequence[Any]) -> Any:
        """Its value for those of the units, which may be anything that computes like numbers."""
        values = [units[place] for place in self.units]
        if self.kind == "sum":
            return sum(values[1:], values[0]) + self.number if self.number else sum(values[1:], values[0])
        product = math.prod(values[1:], start=values[0])
        if self.number == 1:
            return product
        return product * self.number if self.kind == "product" else product // self.number


class Unit(NamedTuple):
    """What others are computed from; itself computed from units before it, or not."""

    column: Column
    made: Expression | None


class Expressions(NamedTuple):
    """Sizes by what they are computed from: those that are not the same in all examples."""

    units: tuple[Unit, ...]
    found: dict[Column, Expression]

    def values(self, free: Sequence[Any]) -> list[Any]:
        """Those of all units; the ones that are not computed have the values `free`, in order."""
        rest, values = iter(free), list[Any]()
        for unit in self.units:
            values.append(next(rest) if unit.made is None else unit.made.of(values))
        return values


def expressions(columns: Sequence[Column]) -> Expressions:
    """Explain each column by those that stand before it, as simply as the examples allow.

    What the examples cannot tell apart is guessed: for another example the result must be compared.
    """
    units: list[Unit] = []
    found: dict[Column, Expression] = {}

    def place(column: Column, made: Expression | None) -> int:
        """Which unit a column is, from now on."""
        known = [unit.column for unit in units]
        if column not in known:
            units.append(Unit(column, made))
        return [*known, column].index(column)

    for column in dict.fromkeys(columns):
        if len(set(column)) == 1:
            continue
        made = _product(column, [unit.column for unit in units])
        if made is None:
            terms, number = _terms(column, list(found)) or ((), 0)
            places = tuple(place(term, found[term]) for term in terms)
            added = Expression("sum", places, number) if places else None
            made = Expression("product", (place(column, added),), 1)
        found[column] = made
    return Expressions(tuple(units), found)


def _product(column: Column, units: Sequence[Column]) -> Expression | None:
    """The simplest product or quotient that a column is; products of different units before powers."""
    for count in (1, 2, 3):
        chosen = itertools.combinations_with_replacement(range(len(units)), count)
        for some in sorted(chosen, key=lambda some: -len(set(some))):
            product = [math.prod(units[place][i] for place in some) for i in range(len(column))]
            if factor := _ratio(column, product):
                return Expression("product", some, factor)
            if divisor := _ratio(product, column):
                return Expression("quotient", some, divisor)
    return None


def _terms(column: Column, known: Sequence[Column]) -> tuple[tuple[Column, ...], int] | None:
    """Two columns whose sum a column is, or one and a number."""
    for one, other in itertools.combinations_with_replacement(known, 2):
        if all(a + b == c for a, b, c in zip(one, other, column, strict=True)):
            return (one, other), 0
    for one in known:
        beyond = {c - a for a, c in zip(one, column, strict=True)}
        if len(beyond) == 1:
            return (one,), beyond.pop()
    return None


def _ratio(ones: Sequence[int], others: Sequence[int]) -> int | None:
    """The whole number by which all of the others are multiplied to give the ones."""
    ratios = {one // other if one % other == 0 else 0 for one, other in zip(ones, others, strict=True)}
    return ratios.pop() or None if len(ratios) == 1 else None
