"""What differs on a CUDA device: attention kernels and their log-sum-exps, compiled graphs, memory."""

from collections.abc import Callable, Iterator
from inspect import unwrap
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import graphcache
from examples.digits.model import ddim_scheduler, load_model
from examples.digits.sample import sample
from graphcache import Plan, presets
from graphcache.analysis.cost import graph_flops
from graphcache.compiler.program import Program
from graphcache.ir.graph import storage_bytes
from reference import assert_same, cast, subject
from tests.analysis.test_tokens import inputs, measured, naive_map
from tiny_pipelines import variant_of
from zoo import CASES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIXED = Plan.parse("""
    plan steps=8 preset=none
    l = linear weight=0.5
    a = tokens 0.5 by random multiple=4
    @self   ##l.##.l
    @joint  ##l.##.l
    @cross  #.#.#.#.
    @mlp    #a.a#al.
""")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "latte", "cogvideox", "wan"])
def test_an_all_compute_plan_is_eager_bit_for_bit(name: str) -> None:
    on = subject(name, device="cuda")
    assert_same(on.sample(on.transform(presets.compute(4)), 4), on.sample(on.model, 4))


@pytest.mark.parametrize("name", ["dit", "pixart", "latte", "cogvideox"])
def test_a_plan_is_the_reference_interpreters_bit_for_bit(name: str) -> None:
    on = subject(name, device="cuda")
    plan = presets.taylorseer(8, 3)
    assert_same(on.sample(on.transform(plan), 8), on.sample(on.reference(plan), 8))


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_compiled_graphs_give_what_eager_ones_give(name: str) -> None:
    on = subject(name, device="cuda")
    made = [on.sample(on.transform(MIXED, backend=backend), 8) for backend in (None, "inductor")]
    torch.testing.assert_close(*made, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_cuda_graphs_give_what_eager_ones_give_in_every_generation(name: str) -> None:
    """The first runs, the second records, the others replay; nothing that is cached is overwritten."""
    on = subject(name, device="cuda")
    expected = on.sample(on.transform(MIXED), 8)
    model = on.transform(MIXED, backend={"mode": "reduce-overhead"})
    for _ in range(4):
        torch.testing.assert_close(on.sample(model, 8), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "role", "site", "dtype", "close"),
    [
        ("dit", "self", "@mlp", torch.float32, 1e-5),
        ("dit", "self", "@mlp", torch.bfloat16, 2e-3),
        ("flux", "parallel", "@parallel", torch.bfloat16, 2e-3),
    ],
)
def test_influence_is_the_attention_received(
    name: str, role: str, site: str, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = subject(name, dtype=dtype, device="cuda")
    ours = measured(on, monkeypatch, f"a = tokens 4 by influence multiple=1\n{site} #a")[0]
    sums = naive_map(on, role, inputs(on)).sum(1)
    torch.testing.assert_close(ours, sums / sums.norm(dim=1, keepdim=True), rtol=close, atol=close)


def test_entropy_is_that_of_the_mean_map(monkeypatch: pytest.MonkeyPatch) -> None:
    on = subject("pixart", device="cuda")
    mean = naive_map(on, "cross", inputs(on))
    expected = 1 - (mean * (mean + 1e-7).log()).sum(-1)
    ours = measured(on, monkeypatch, "a = tokens 4 by entropy multiple=1\n@cross[0..0] #a")[0]
    torch.testing.assert_close(ours, expected / expected.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_count_no_flops(dtype: torch.dtype) -> None:
    program = Program(subject("dit", dtype=dtype, device="cuda").captured, None).prepared()
    plan = Plan.parse("plan steps=2\na = tokens 4 by influence multiple=1\n@mlp #a")
    full = program.phase(program.schedule(plan), 0).step
    assert graph_flops(full) == graph_flops(program.captured.step)


def test_predicted_bytes_are_those_that_the_device_allocates() -> None:
    on = subject("pixart", batch=64, device="cuda")
    model = graphcache.transform(on.model, presets.fora(4, 2))
    static, latents = on.static(), on.latents()
    model(**on.call(static, latents, 1.0))
    model.reset()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model(**on.call(static, latents, 1.0))
    (branch,) = model.summary().branches
    held = torch.cuda.memory_allocated() - before
    # the allocator rounds each tensor up to 512 bytes
    assert branch.peak_bytes <= held + 512 * 64
    assert held <= branch.peak_bytes + 512 * 64


def test_a_plan_is_profiled_searched_and_timed_on_the_device() -> None:
    model = load_model().to("cuda")

    def sampler(model: Any, seed: int, steps: int) -> torch.Tensor:
        labels = torch.arange(4, device="cuda")
        drawn: torch.Tensor = unwrap(sample)(model, ddim_scheduler(), labels, steps=steps, seed=seed)
        return drawn

    steps = 8
    profile = graphcache.profile(
        model, [0], steps=steps, sampler=sampler, probes=1, conditional="first", backend="inductor"
    )
    assert profile.timings["plain"] > 0
    found = graphcache.search(profile, speedup=1.5)
    uncached, cached = sampler(model, 1, steps), sampler(graphcache.transform(model, found.plan), 1, steps)
    assert float((uncached - cached).square().mean()) < 0.01


CUDA = torch.device("cuda")
OFFLOADING: dict[str, Callable[[Any], Any]] = {
    "modules": lambda model: cpu_offload(model, CUDA, offload_buffers=len(model._parameters) > 0),
    "blocks": lambda model: model.enable_group_offload(CUDA, num_blocks_per_group=1),
    "blocks by stream": lambda model: model.enable_group_offload(
        CUDA, num_blocks_per_group=1, use_stream=True
    ),
    "leafs by stream": lambda model: model.enable_group_offload(
        CUDA, offload_type="leaf_level", use_stream=True, record_stream=True
    ),
}


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("kind", [*OFFLOADING, "streamed"])
def test_weights_come_from_host_memory(kind: str, backend: str | None) -> None:
    on = subject("wan", device="cuda")
    plan = presets.fora(6, 3)
    expected = on.sample(on.transform(plan, backend=backend), 6)
    model: Any = CASES["wan"].make()
    OFFLOADING.get(kind, id)(model)
    made = graphcache.transform(model, plan, backend=backend, stream_weights=kind == "streamed")
    for _ in range(3):
        close = 0 if backend is None else 1e-3
        torch.testing.assert_close(on.sample(made, 6), expected, rtol=close, atol=close)
    assert not any(weight.is_cuda for weight in model.parameters())
    assert all(weight.is_pinned() for weight in model.parameters() if kind == "streamed")


@pytest.mark.parametrize("kind", ["blocks by stream", "streamed"])
def test_two_blocks_are_on_the_device_at_a_time(kind: str) -> None:
    model: Any = variant_of("wan", 0, num_layers=16, ffn_dim=16384)()
    OFFLOADING.get(kind, id)(model)
    block = sum(map(storage_bytes, model.blocks[0].parameters()))
    made = graphcache.transform(model, presets.compute(1), stream_weights=kind == "streamed")
    call = cast(CASES["wan"].kwargs(1), None, "cuda")
    made(**call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made(**call)
    assert torch.cuda.max_memory_allocated() - before < 4 * block
    assert torch.cuda.memory_allocated() - before < block
