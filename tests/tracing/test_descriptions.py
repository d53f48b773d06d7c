"""One description for all values that look alike, and each kind of operation is asked once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache.ir.graph import layout
from graphcache.libraries.torch_private import FakeTensorMode
from graphcache.tracing.descriptions import Descriptions


def test_values_that_look_alike_have_one_description() -> None:
    known = Descriptions(FakeTensorMode())
    one = known.tensor(torch.zeros(2, 3))
    assert known.tensor(torch.ones(2, 3)) is one
    others = [
        torch.zeros(3, 2),
        torch.zeros(3, 2).T,
        torch.zeros(9)[3:].view(2, 3),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 3, requires_grad=True),
        nn.Parameter(torch.zeros(2, 3)),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(2, 3, dtype=torch.complex64).conj(),
    ]
    found = [known.tensor(other) for other in others]
    assert len({id(each) for each in (one, *found)}) == len(others) + 1
    assert [layout(each) for each in found] == list(map(layout, others))


@pytest.mark.parametrize(
    ("first", "second", "calls"),
    [
        (((0, 1), {}), ((0, 1), {}), 1),
        (((0, 1), {}), ((True, 1), {}), 2),
        (((0, 1), {}), ((0, 1.0), {}), 2),
        (((0,), {"times": 1}), ((0,), {"times": 2}), 2),
        (([0, 1], {}), ((0, 1), {}), 1),
        ((((2, 3),), {}), ((2, 3), {}), 2),
    ],
    ids=str,
)
def test_an_operation_is_asked_once_for_equal_arguments(first: Any, second: Any, calls: int) -> None:
    asked = list[Any]()

    def operation(value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        asked.append((args, kwargs))
        return value.T, len(asked)

    mode = FakeTensorMode()
    known = Descriptions(mode)
    with mode:
        (one, number), (other, again) = (
            known.result(operation, (known.tensor(torch.zeros(2, 3)), *args), kwargs)
            for args, kwargs in (first, second)
        )
    assert (number, again, len(asked)) == (1, calls, calls)
    assert one is other, "of one kind, whichever operation it came from"
    assert one.shape == (3, 2)
