"""Other libraries' private names: which one is gone, told where it is looked for."""

import contextlib
import operator
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from graphcache.ir.errors import GraphCacheError


class MissingName(GraphCacheError, ImportError):
    """A version of a library lacks a private name that graphcache uses."""


@contextlib.contextmanager
def names_of(library: str) -> Iterator[None]:
    """Within, the library's private names are imported and read.

    Raises:
        MissingName: one is gone; the message says which, of which version, and which versions have it.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(f"{library}."):
            raise  # something that the library itself needs
        version = getattr(sys.modules.get(library), "__version__", "")
        raise MissingName(
            f"{library} {version} lacks a private name that graphcache uses: {error}. "
            f"Install a version that graphcache is made for: {_supported(library)}"
        ) from error


def _supported(library: str) -> str:
    """The versions of a library that the project asks for, itself or for one of its extras."""
    try:
        wanted = metadata.requires("graphcache-dit") or ()
    except metadata.PackageNotFoundError:  # run from a checkout
        wanted = ()
    found = (text.partition(";")[0].strip() for text in wanted if re.match(rf"{library}\b", text))
    return next(found, f"what graphcache's pyproject.toml says of {library}")


def attribute(example: Any, name: str) -> Callable[[Any], Any]:
    """Reads a private attribute of things like the example, which has to have it."""
    read = operator.attrgetter(name)
    read(example)
    return read
