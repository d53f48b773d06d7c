"""Libraries that only some functions need."""

import importlib
from typing import Any

from graphcache.ir.errors import GraphCacheError


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional library.

    Raises:
        GraphCacheError: it is not installed; the message says what needs it and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise GraphCacheError(
            f"{purpose} needs {library}; install it with: pip install graphcache-dit[{extra}]"
        ) from error
