"""What no other one beats in two things at once."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def unbeaten(items: Iterable[Item], costs: Callable[[Item], tuple[float, float]]) -> tuple[Item, ...]:
    """Those that no other one is cheaper than in one cost and not dearer in the other, by the first cost.

    Of several with equal costs the first one stays.
    """
    front: list[Item] = []
    best = float("inf")
    for item in sorted(items, key=costs):
        second = costs(item)[1]
        if second < best:
            front.append(item)
            best = second
    return tuple(front)
