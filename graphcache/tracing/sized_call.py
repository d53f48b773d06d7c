"""A call whose whole numbers are sizes of tensors, for which a trace has symbols."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.ir.call import CallSpec
from graphcache.ir.tree import Leaf, changed


def is_size(value: Any) -> bool:
    """Whether a trace has a symbol for a number: not for 0, 1, switches and what is negative."""
    return type(value) is int and value > 1


@dataclass(frozen=True)
class SizedCall(CallSpec):
    """A call that takes a further tensor for each of its whole numbers, which is that tensor's first size.

    Attributes:
        tensors: how many the call itself has.
        sizes: the numbers, in the order of the further tensors.
    """

    tensors: int = 0
    sizes: tuple[int, ...] = ()

    @staticmethod
    def made_of(call: CallSpec, as_sizes: bool = True) -> "SizedCall":
        """The same call, with its numbers as sizes or as they are."""
        names, sizes = [*call.leaf_names], list[int]()

        def as_size(value: Any, where: str) -> Any:
            if not as_sizes or not is_size(value):
                return value
            names.append(where)
            sizes.append(value)
            return Leaf(len(names) - 1)

        template = {name: changed(value, as_size, where=name) for name, value in call.template.items()}
        count = len(call.leaf_names)
        roles = call.latents, call.times, call.numbers
        return SizedCall(template, call.positional_only, tuple(names), *roles, count, tuple(sizes))

    def stand_ins(self) -> list[torch.Tensor]:
        """The further tensors; nothing is in them."""
        return [torch.empty(size, 0) for size in self.sizes]

    def at(self, tensors: Sequence[torch.Tensor]) -> CallSpec:
        """The call itself, with the sizes of these tensors, the further ones included, for its numbers."""

        def number(value: Any, _: str) -> Any:
            is_size = isinstance(value, Leaf) and value.index >= self.tensors
            return len(tensors[value.index]) if is_size else value

        template = {name: changed(value, number) for name, value in self.template.items()}
        names = self.leaf_names[: self.tensors]
        return CallSpec(template, self.positional_only, names, self.latents, self.times, self.numbers)

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves: list[Any] = [*tensors[: self.tensors], *(one.shape[0] for one in tensors[self.tensors :])]
        return super().arguments(leaves)
