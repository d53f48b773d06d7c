"""What contenders are timed beside, and the least time that a device needs."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import graphcache
from graphcache import presets
from graphcache.compiler.backends import compile_blocks_plainly
from graphcache.planning.bench import BY_BLOCKS, EAGER, WHOLE, benchmark
from graphcache.planning.floors import Floor, Rates
from inside import programs_of
from tiny import arguments, tiny

STEPS = 2


class Multiplies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16, bias=False)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * timestep


def test_a_floor_counts_every_product_and_every_tensor_once() -> None:
    """Four rows of 8 by 8 x 16: 1,024 FLOPs; 32 + 1 + 128 + 64 numbers of 4 bytes."""
    model = graphcache.transform(Multiplies().eval(), presets.compute(STEPS))
    with torch.no_grad():
        model(x=torch.randn(4, 8), timestep=torch.ones(()))
    (program,) = programs_of(model)
    floor = Floor.of(program.step, Rates(flops=1e6, bytes=1e6))
    assert floor.flops_ms == pytest.approx(1.024)
    assert floor.bytes_ms == pytest.approx(0.9)
    assert floor.ms == floor.flops_ms


def test_rates_are_what_the_device_reaches() -> None:
    rates = Rates.of(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.flops < 1e15
    assert 1e7 < rates.bytes < 1e14


def test_blocks_are_compiled_in_a_copy_with_the_same_weights() -> None:
    counter, model = CompileCounter(), tiny(4)
    compiled = compile_blocks_plainly(model, counter)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**arguments()), model(**arguments()))
    assert counter.frame_count == 1, "blocks are alike, and compiled once"
    assert {*map(id, compiled.parameters())} == {*map(id, model.parameters())}
    assert not any(module._compiled_call_impl for module in model.modules())


def test_the_plain_model_runs_in_every_way_that_is_asked_for() -> None:
    timings = benchmark(
        tiny(2),
        arguments(),
        {"all": presets.compute(STEPS)},
        backend="eager",
        rounds=1,
        plain=(EAGER, BY_BLOCKS),
    )
    assert [timing.name for timing in timings] == [EAGER, WHOLE, BY_BLOCKS, "all"]
    assert all(timing.device_bytes is None for timing in timings)
