"""What a branch keeps between steps: history entries, newest first, as plain tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from graphcache.ir.errors import StateError
from graphcache.ir.history import History
from graphcache.ir.text import describe

Entry = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Choice:
    """The tokens of one step of a site.

    Places int64 (rows, budget), rising; the cluster of every token int64 (rows, tokens), where it has one.
    """

    places: torch.Tensor
    clusters: torch.Tensor


class CacheState:
    """Slots of one branch: history -> entries -> one tensor per part.

    The runner threads it through the phases; no graph and no module ever holds it.
    """

    def __init__(self) -> None:
        self.entries: dict[History, list[Entry]] = {}
        self.hoisted: Mapping[str, torch.Tensor] = {}
        self.half_hoisted: Mapping[str, torch.Tensor] | None = None
        self.chosen: Mapping[History, Choice] = {}

    def store(self, history: History, entry: Entry) -> None:
        """Make an entry its history's newest.

        Raises:
            StateError: it has another shape or dtype than those before.
        """
        entries = self.entries.setdefault(history, [])
        if entries:
            for new, old in zip(entry, entries[0], strict=True):
                if new.shape != old.shape or new.dtype != old.dtype:
                    raise StateError(
                        f"{history}: {describe(new)} comes to be cached beside {describe(old)}; call reset() "
                        "and report this as a fault of graphcache"
                    )
        entries.insert(0, entry)

    def trim(self, keep: Mapping[History, int]) -> None:
        """Drop what no later step reads."""
        if not any(keep.values()):
            self.entries.clear()
            return
        for history, entries in self.entries.items():
            del entries[keep.get(history, 0) :]

    def tensors(self) -> Sequence[torch.Tensor]:
        return [part for entries in self.entries.values() for entry in entries for part in entry]

    def held_bytes(self) -> int:
        """Bytes of the distinct storages that history entries keep alive."""
        return _unique_bytes(self.tensors())

    def hoisted_bytes(self) -> int:
        """Bytes of the distinct storages that hoisted values keep alive."""
        return _unique_bytes(list(self.hoisted.values()))


def _unique_bytes(tensors: Sequence[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
