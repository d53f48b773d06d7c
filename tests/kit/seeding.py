"""Random numbers that depend on the run's seed and on a name, and on nothing that ran before."""

import functools
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import torch

P, T = ParamSpec("P"), TypeVar("T")


class Run:
    """The seed of this run of the tests, and whether all cases are run; the command line may set others."""

    seed = int(os.environ.get("SEED") or 0)
    every = False


def seed_of(name: str) -> int:
    """32 bits, the same ones in every process."""
    return int.from_bytes(hashlib.sha256(f"{Run.seed} {name}".encode()).digest()[:4])


@contextmanager
def numbers_of(name: str) -> Iterator[None]:
    """Global generators begin anew for this name, and go on afterwards as if nothing had been drawn."""
    plain, array = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        seed = seed_of(name)
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(array)


def own_numbers(make: Callable[P, T]) -> Callable[P, T]:
    """For what several tests share: it draws the same numbers whichever test asks for it first."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        with numbers_of(f"{make.__module__}.{make.__qualname__}"):
            return make(*args, **kwargs)

    return made
