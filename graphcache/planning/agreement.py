"""What ranks of a mesh have in common: the first one decides, writes and reads; all go on with the same."""

from collections.abc import Callable
from typing import Any, TypeVar

from graphcache.compiler.exchanges import answered
from graphcache.ir.errors import GraphCacheError

Value = TypeVar("Value")
_BETWEEN = "between generations"


def leads(mesh: Any) -> bool:
    """Whether this process writes files: it is the first rank of a DeviceMesh, or the only one."""
    return mesh is None or not any(mesh.get_coordinate())


def of_first(mesh: Any, value: Value) -> Value:
    """The first rank's value, on all of them: what was timed or summed has other last bits on each."""
    if mesh is None:
        return value
    from torch import distributed

    held = [value]
    with answered(_BETWEEN):
        for dim in range(mesh.ndim):
            distributed.broadcast_object_list(held, group=mesh.get_group(dim), group_src=0)
    return held[0]


def done_by_first(mesh: Any, work: Callable[[], Value]) -> Value:
    """What the first rank alone does, and gets; its error is every rank's.

    Raises:
        Exception: that.
    """
    if mesh is None:
        return work()
    value, error = None, None
    if leads(mesh):
        try:
            value = work()
        except Exception as raised:
            error = raised
    value, error = of_first(mesh, (value, error))
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def refuse_others(mesh: Any, **given: object) -> None:
    """Raise GraphCacheError on all ranks if one has other settings than the first."""
    if mesh is None:
        return
    from torch import distributed

    first = of_first(mesh, given)
    differ = [name for name in given if given[name] != first[name]]
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        found: list[Any] = [None] * group.size()
        with answered(_BETWEEN):
            distributed.all_gather_object(found, differ, group=group)
        differ = [*dict.fromkeys(name for names in found for name in names)]
    if differ:
        raise GraphCacheError(
            f"mesh=: ranks were given different {', '.join(differ)}; every rank does the same with the same "
            "arguments"
        )
