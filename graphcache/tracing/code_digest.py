"""What code does, as text that is the same in every process."""

import types
from typing import Any


def code_text(code: types.CodeType) -> str:
    """Equal for code that does the same; lines and files do not count."""
    return repr(
        (
            code.co_name,
            code.co_code,
            code.co_exceptiontable,
            code.co_flags,
            (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
            (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars),
            [_constant(item) for item in code.co_consts],
        )
    )


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return code_text(value)
    if isinstance(value, tuple):
        return f"({','.join(map(_constant, value))})"
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(_constant, value)))}}}"
    return f"{type(value).__name__} {value!r}"


def names_in(code: types.CodeType) -> set[str]:
    """The names that code and the functions within it mention."""
    found = {*code.co_names}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names_in(constant)
    return found
