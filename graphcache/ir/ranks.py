"""Processes that share a model's work, as graphs know them: how many, which one this is, their group."""

from dataclasses import dataclass
from typing import Literal

Shared = Literal["tokens", "guidance"]
"""What is shared out: the tokens of the streams, or the batch's rows, guidance's two halves first of all."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """`count` processes of which this is number `rank`; `group` is PyTorch's name for them."""

    count: int
    rank: int
    group: str
    shared: Shared = "tokens"

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count} by {self.shared}"
