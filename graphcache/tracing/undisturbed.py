"""Tracing a model so that it is left as it was."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from graphcache.ir.errors import CaptureError
from graphcache.tracing.belongings import Belongings
from graphcache.tracing.plain_tensors import Originals
from graphcache.tracing.rehearsal import Undo

Result = TypeVar("Result")


def undisturbed(
    model: nn.Module, originals: Originals, rehearse: Callable[[], Undo], trace: Callable[[], Result]
) -> Result:
    """Trace a model as it is, and put back whatever its forward writes meanwhile.

    A forward that cannot be traced while its tables are empty is traced after a real call, which then stays.

    Args:
        model: what is traced.
        originals: of inference tensors, behind which others are hidden while the model is called.
        rehearse: calls the model for real, which fills what nobody can put back; undoes its in-place writes.
        trace: calls it with fake tensors.

    Raises:
        CaptureError: from `rehearse` or `trace`, or because fake tensors are left in the model.
    """
    before = Belongings(model)
    try:
        with originals.hidden(before.keepers):
            undo = rehearse()
        is_changed = undo()
    finally:
        is_other = before.put_back()
    try:
        return _left(model, before, originals, trace)
    except CaptureError:
        if not is_changed and not is_other:
            raise
    return _after_a_call(model, before, originals, rehearse, trace)


def _after_a_call(
    model: nn.Module,
    before: Belongings,
    originals: Originals,
    rehearse: Callable[[], Undo],
    trace: Callable[[], Result],
) -> Result:
    undo = rehearse()
    try:
        return _left(model, Belongings(model), originals, trace)
    except BaseException:
        undo()
        before.put_back()
        raise


def _left(
    model: nn.Module, as_it_is: Belongings, originals: Originals, trace: Callable[[], Result]
) -> Result:
    """Trace; afterwards the model is as it is."""
    try:
        with originals.hidden(as_it_is.keepers):
            result = trace()
    finally:
        as_it_is.put_back()
    known = {str(path) for path in as_it_is.fakes}
    for path in Belongings(model).fakes:
        if str(path) not in known:
            raise CaptureError(
                f"the model's forward keeps a tensor of the tracing at '{path}', from where it cannot be "
                "taken out; keep it in an attribute, list or dict of a module, or call the model once before"
            )
    return result
