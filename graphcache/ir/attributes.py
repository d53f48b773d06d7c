"""An object's attributes, without a question to its class."""

from typing import Any


def attributes_of(thing: Any) -> Any:
    """The table of an object's own attributes; None where it has none.

    Asked for it in the ordinary way, objects without one that stand in for others raise whatever they like.
    """
    try:
        return object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None
