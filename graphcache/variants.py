"""The forms that a model takes: with these hooks and adapters or with others, each captured once."""

import itertools
from collections.abc import Hashable, Set

from torch import nn

from graphcache.compile import COMPILING
from graphcache.hooks import refuse_uncapturable
from graphcache.watch import Watch


class Variants:
    """Numbers the forms of a model; one that returns has its number again.

    Numbers grow, and none is used twice. Those in use before modules or weights were replaced are gone for
    good; `numbers` are the others.
    """

    def __init__(self, model: nn.Module, everything: bool) -> None:
        self._model = model
        self._everything = everything
        self._now: Watch | None = None
        self._number = 0
        self._numbers = itertools.count(1)
        self._known: dict[int, Watch] = {}

    @property
    def numbers(self) -> set[int]:
        """The variants whose captures may be used."""
        return {*self._known, self._number}

    def look(self, begins: bool) -> int:
        """The number of the form that the model has now.

        Args:
            begins: whether a generation begins, at which everything is looked at; within one it is hooks,
                adapters, processors and exchanged parts, if not everything is wanted.

        Raises:
            CaptureError: the model has taken a form that no capture can hold.
        """
        watch = self._now
        thorough = begins or self._everything
        if watch is not None and not thorough and not watch.is_touched():
            return self._number
        with COMPILING:  # tracing changes a model for a while
            return self._found(thorough)

    def _found(self, thorough: bool) -> int:
        watch = self._now
        if watch is not None and watch.has_other_structure():
            self._known.clear()
        for number in dict.fromkeys((self._number, *self._known)):
            known = self._known.get(number)
            if known is not None and not (known.has_other_surface() if thorough else known.is_touched()):
                self._now, self._number = known, number
                return number
        refuse_uncapturable(self._model)
        if watch is not None or not self._number:
            self._now, self._number = None, next(self._numbers)
        return self._number

    def captured(self) -> None:
        """A capture of the present form was made.

        What is watched is noted afterwards, because a first forward may fill what later ones only read.
        """
        if self._now is None:
            self._now = self._known[self._number] = Watch(self._model)

    def keep(self, numbers: Set[Hashable]) -> None:
        """Forget all but these variants and the present one."""
        for number in self._known.keys() - numbers - {self._number}:
            del self._known[number]
