"""The forms that a model takes: with these hooks and adapters or with others, each captured once."""

import itertools
from collections.abc import Hashable, Set

from torch import nn

from graphcache.compiler.watch import Watch
from graphcache.libraries.exclusive import COMPILING
from graphcache.tracing.homes import Homes
from graphcache.tracing.hooks import refuse_uncapturable


class Variants:
    """Numbers the forms of a model; one that returns has its number again.

    Numbers grow, and none is used twice. Those in use before modules or weights were replaced are gone for
    good; `numbers` are the others.
    """

    def __init__(self, model: nn.Module, homes: Homes, everything: bool) -> None:
        self._model = model
        self._homes = homes
        self._everything = everything
        self._now = 0
        self._numbers = itertools.count(1)
        self._known: dict[int, Watch] = {}

    @property
    def numbers(self) -> set[int]:
        """The variants whose captures may be used."""
        return {*self._known, self._now}

    def look(self, begins: bool) -> int:
        """The number of the form that the model has now.

        Args:
            begins: whether a generation begins, at which everything is looked at; within one it is hooks,
                adapters and processors, if not everything is wanted.

        Raises:
            CaptureError: the model has taken a form that no capture can hold.
        """
        thorough = begins or self._everything
        number = self._now
        if self._is(number, thorough):
            return number
        with COMPILING:  # tracing changes a model for a while
            return self._found(thorough)

    def _is(self, number: int, thorough: bool) -> bool:
        """Whether the model has the form that was noted under a number."""
        watch = self._known.get(number)
        if watch is None:
            return False
        try:
            if not thorough:
                return not watch.is_touched()
            return not (watch.has_other_structure() or watch.has_other_surface())
        except RuntimeError:  # another thread traces just now, and a dict changed its size
            return False

    def _found(self, thorough: bool) -> int:
        watch = self._known.get(self._now)
        if watch is not None and watch.has_other_structure():
            self._known.clear()
        for number in dict.fromkeys((self._now, *self._known)):
            if self._is(number, thorough):
                self._now = number
                return number
        refuse_uncapturable(self._model)
        if watch is not None or not self._now:
            self._now = next(self._numbers)
        return self._now

    def captured(self) -> None:
        """A capture of the present form was made.

        What is watched is noted afterwards, because a first forward may fill what later ones only read.
        """
        if self._now not in self._known:
            self._known[self._now] = Watch(self._model, self._homes)

    def keep(self, numbers: Set[Hashable]) -> None:
        """Forget all but these variants and the present one."""
        for number in self._known.keys() - numbers - {self._now}:
            del self._known[number]
