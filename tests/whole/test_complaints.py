"""What users of today's caches complain of most: what happens here, beside what happens there.

There is diffusers 0.42.1 and cache-dit 1.5.3. What is asserted of them was seen on these models. Tests of
their faults alone are run by `make test-foreign`: where one of them is mended, the test says so by failing,
and docs/coming-from.md may have to follow.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload_with_hook
from diffusers import hooks
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import graphcache
from graphcache import Plan, StateError, presets
from inside import engine_of
from pipelines import PIPELINES, TinyPipeline
from reference import Reference, assert_same, capture_call, runner_tensors, subject
from reference_pipeline import reference, transformed
from tiny import arguments, tiny
from zoo import CASES

WAN, CASE, STEPS = PIPELINES["wan"], CASES["wan"], 6
"""Most tests take a Wan of two blocks: a video model that every cache here supports."""

PIXART = PIPELINES["pixart"]
RATIOS = [1.0, 1.0, 1.01, 1.02, 1.0, 1.03]
FORA = Plan.parse("plan steps=6 preset=none\n* #..#..")
foreign_fault = pytest.mark.foreign_fault
GRAPHS = 2
"""Computed, reused; what runs once per generation is not compiled."""


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


@pytest.fixture
def cache_dit() -> Any:
    return pytest.importorskip("cache_dit")


def first_block(threshold: float = 0.4) -> Any:
    return hooks.FirstBlockCacheConfig(threshold=threshold)


def magnitudes(steps: int = STEPS) -> Any:
    return hooks.MagCacheConfig(
        mag_ratios=RATIOS, num_inference_steps=steps, retention_ratio=0.34, max_skip_steps=2
    )


def broadcast() -> Any:
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )


def forecasts() -> Any:
    """By default nothing of Wan would be hooked, see below."""
    return hooks.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, cache_identifiers=[r"blocks\.\d+\.attn1"]
    )


def dbcache(cache_dit: Any, on: Any, **options: Any) -> Any:
    """The model or pipeline under cache-dit, by default deciding as it runs, behind the first block."""
    front = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 1}
    fixed = {**front, "residual_diff_threshold": 0.4, "enable_separate_cfg": False}
    cache_dit.enable_cache(on, cache_config=cache_dit.DBCacheConfig(**{**fixed, **options}))
    return on


def hooked(config: Any) -> Any:
    model: Any = CASE.make()
    model.enable_cache(config)
    return model


def in_context(model: Any, call: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The call, or the model's, as diffusers' pipelines make it."""

    def run(**kwargs: Any) -> Any:
        with model.cache_context("cond"):
            return model(**kwargs) if call is None else call(**kwargs)

    return run


def generation(
    call: Callable[..., Any], steps: int = STEPS, rows: slice = slice(None), seed: int = 0
) -> Tensor:
    """The latents that Euler steps come to, of some rows of a batch of two."""
    static = {name: item[rows] if isinstance(item, Tensor) else item for name, item in CASE.static(2).items()}
    latents = CASE.latents(2, seed)[rows]
    for step in range(steps):
        output = call(**CASE.call(static, latents, 1 - step / steps))
        latents = latents - CASE.prediction(output) / steps
    return latents


def hooks_of(model: nn.Module) -> list[Any]:
    """What diffusers hooked to any of the modules."""
    registries = [vars(module).get("_diffusers_hook") for module in model.modules()]
    return [hook for registry in registries if registry for hook in registry.hooks.values()]


def warnings_of(library: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(library) and record.levelno >= logging.WARNING
    ]


def decisions(model: Any) -> list[str]:
    """Grows with every call: "#" where the second block was computed, "." where it was skipped."""
    made: list[str] = []
    model.register_forward_pre_hook(lambda *_: made.append("."))
    model.blocks[1].attn2.register_forward_hook(lambda *_: made.__setitem__(-1, "#"))
    return made


def deviation(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def local(pipe: Any) -> Any:
    """The pipeline as the only instance of its class, because cache-dit replaces the class's `__call__`."""
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    return pipe


def interrupt(tiny_pipe: TinyPipeline, pipe: Any, after: int = 2) -> None:
    """A generation that its user stops."""
    step, calls = pipe.scheduler.step, iter(range(after))

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with patch.object(pipe.scheduler, "step", stopped), pytest.raises(KeyboardInterrupt):
        tiny_pipe.generate(pipe, STEPS)


class Compiled:
    """A model under torch.compile, and how many graphs it became."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.counter = CompileCounterWithBackend("eager")
        self.call: Any = torch.compile(model, backend=self.counter, **options)

    @property
    def graphs(self) -> int:
        return int(self.counter.frame_count)


def breaks() -> int:
    return sum(counters["graph_break"].values())


def test_a_cached_model_compiles_to_one_graph_a_phase_and_never_again() -> None:
    """sglang #19471, cache-dit #76 and #1089, ComfyUI #14795: compiling fails, is slow or is lost."""
    counter = CompileCounterWithBackend("aot_eager")
    model = subject("wan").transform(FORA, backend=counter)
    for _ in range(2):
        generation(model)
        assert (counter.frame_count, breaks()) == (GRAPHS, 0)


@foreign_fault
@pytest.mark.parametrize("config", [first_block, magnitudes])
def test_diffusers_hooks_break_the_graph(config: Callable[[], Any]) -> None:
    """At every decision; asked for a single graph, torch.compile fails."""
    model = hooked(config())
    compiled = Compiled(model)
    generation(in_context(model, compiled.call), steps=2)
    assert breaks() > 0
    assert compiled.graphs > 1
    whole = Compiled(hooked(config()), fullgraph=True)
    with pytest.raises(Unsupported, match=r"torch\.compiler\.disable"):
        generation(in_context(whole.call._orig_mod, whole.call), steps=1)


@foreign_fault
def test_pyramid_attention_broadcast_is_compiled_anew_at_every_step() -> None:
    """It counts the steps in Python; at the limit torch.compile gives up, by default at the ninth."""
    model = hooked(broadcast())
    compiled = Compiled(model, fullgraph=True)
    limited = torch._dynamo.config.patch(recompile_limit=3)
    with limited, pytest.raises(FailOnRecompileLimitHit):
        generation(in_context(model, compiled.call), steps=4)
    assert compiled.graphs == 3


@foreign_fault
def test_cache_dit_breaks_the_graph(cache_dit: Any) -> None:
    compiled = Compiled(dbcache(cache_dit, CASE.make()))
    generation(compiled.call, steps=1)
    assert breaks() > 0
    assert compiled.graphs > 1
    with pytest.raises(Unsupported):
        generation(Compiled(dbcache(cache_dit, CASE.make()), fullgraph=True).call, steps=1)


def test_a_pipeline_compiles_in_its_first_generation_only() -> None:
    counter = CompileCounterWithBackend("eager")
    pipe = transformed(WAN, FORA, backend=counter)
    graphs = []
    for _ in range(2):
        WAN.generate(pipe, STEPS)
        graphs.append(counter.frame_count)
    assert graphs == [GRAPHS, GRAPHS]


def compiled_after(counter: Any) -> Any:
    model = graphcache.transform(tiny(2), FORA)
    model.compile(backend=counter)
    return model


def compiled_before(counter: Any) -> Any:
    return graphcache.transform(torch.compile(tiny(2), backend=counter), FORA)


def test_enabling_and_compiling_come_in_any_order() -> None:
    """TensorRT-LLM #16508 wants one order, sglang #25328 the other."""
    kwargs, results = arguments(), []
    for order in (compiled_after, compiled_before):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = order(counter)
        times = [torch.full((2,), 1 - step / STEPS) for step in range(STEPS)]
        results.append([model(**{**kwargs, "timestep": time}) for time in times])
        assert counter.frame_count == GRAPHS
    assert_same(*results)


@foreign_fault
def test_diffusers_hooks_fit_regional_compilation_in_no_order() -> None:
    """`compile_repeated_blocks(fullgraph=True)` is what diffusers' documentation advises."""
    for orders in ("enable compile", "compile enable"):
        model: Any = CASE.make()
        for action in orders.split():
            if action == "enable":
                model.enable_cache(first_block())
            else:
                model.compile_repeated_blocks(fullgraph=True, backend="eager")
        with pytest.raises(Unsupported):  # what it says depends on what was compiled before
            generation(in_context(model), steps=1)


@foreign_fault
def test_cache_dit_refuses_what_was_compiled_before(cache_dit: Any) -> None:
    compiled = torch.compile(CASE.make(), backend="eager")
    with pytest.raises(ValueError, match="OptimizedModule is not officially supported"):
        cache_dit.enable_cache(compiled, cache_config=cache_dit.DBCacheConfig())


Contexts = Callable[[str], AbstractContextManager[Any]]


def guided(
    cond: Callable[..., Any], uncond: Callable[..., Any], contexts: Contexts = lambda name: nullcontext()
) -> Tensor:
    """A loop that calls the model twice a step, the second time with the opposite prompt."""
    static, latents = CASE.static(2), CASE.latents(2)
    opposite = {**static, "encoder_hidden_states": -static["encoder_hidden_states"]}
    for step in range(STEPS):
        with contexts("cond"):
            towards = CASE.prediction(cond(**CASE.call(static, latents, 1 - step / STEPS)))
        with contexts("uncond"):
            away = CASE.prediction(uncond(**CASE.call(opposite, latents, 1 - step / STEPS)))
        latents = latents - (away + 4 * (towards - away)) / STEPS
    return latents


def test_guidance_branches_are_kept_apart_or_refused() -> None:
    """vllm-omni #4659, #2371, #5287, #2860: images are wrong under guidance, and nothing says so."""
    on = subject("wan")
    expected = guided(on.reference(FORA), on.reference(FORA))
    named: Any = on.transform(FORA)
    assert_same(guided(named, named, named.cache_context), expected)
    declared = on.transform(FORA, branches=2)
    assert_same(guided(declared, declared), expected)
    undeclared = on.transform(FORA)
    with pytest.raises(StateError, match=r"guidance branches.*model\.cache_context.*'cond'.*branches=2"):
        guided(undeclared, undeclared)


@foreign_fault
def test_magcache_mixes_guidance_branches_that_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    """Told apart as two models would, only inside of contexts; nothing is said outside."""
    apart = guided(in_context(hooked(magnitudes())), in_context(hooked(magnitudes())))
    model = hooked(magnitudes())
    assert_same(guided(model, model, model.cache_context), apart)
    model = hooked(magnitudes())
    assert deviation(guided(model, model), apart) > 0.1
    assert warnings_of("diffusers", caplog) == []


@foreign_fault
def test_pyramid_attention_broadcast_mixes_guidance_branches_even_in_contexts() -> None:
    """Its state has no branches: at every step the second call is given the first one's attention."""
    apart = guided(hooked(broadcast()), hooked(broadcast()))
    model = hooked(broadcast())
    mixed = guided(model, model, model.cache_context)
    assert deviation(mixed, apart) > 0.1
    model = hooked(broadcast())
    assert_same(guided(model, model), mixed)


@foreign_fault
def test_cache_dit_mixes_the_guidance_branches_of_flux(
    cache_dit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """By default, and without a warning: the second call of a step reuses the first one's features."""
    flux = PIPELINES["flux"]
    static = {"steps_computation_mask": [1, 0] * (STEPS // 2), "steps_computation_policy": "static"}
    results, skipped = {}, {}
    for separate in (None, True):
        options = {**static, "num_inference_steps": STEPS, "enable_separate_cfg": separate}
        pipe = dbcache(cache_dit, local(flux.make()), **options)
        results[separate] = flux.generate(pipe, STEPS)
        (stats,) = cache_dit.summary(pipe, logging=False)
        skipped[separate] = stats.cached_steps
    assert skipped[True] == [1, 3, 5]
    assert skipped[None] != skipped[True]
    assert deviation(results[None], results[True]) > 0.1
    assert warnings_of("cache_dit", caplog) == []


@pytest.mark.parametrize("preset", ["fora interval=3", "none"])
def test_one_plan_file_serves_several_models_and_numbers_of_steps(
    preset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TeaCache #2 and #20, SmoothCache #2 and #6, MagCache #32: another model wants another calibration.

    Here a preset is evaluated anew, another grid resampled; the log says so once for each number.
    """
    (tmp_path / "plan.txt").write_text(f"plan steps=6 preset={preset}\n* #..#..\n")
    plan = Plan.load(tmp_path / "plan.txt")
    for name in ("dit", "pixart", "wan"):
        caplog.clear()
        pipe = transformed(PIPELINES[name], plan)
        for steps in (6, 9, 4, 9):
            result = PIPELINES[name].generate(pipe, steps)
            expected = reference(PIPELINES[name], functools.partial(presets.resample, plan), steps=steps)
            assert_same(result, expected)
        how = "it was resampled" if preset == "none" else "it was evaluated anew"
        said = [record.getMessage() for record in caplog.records if record.name == "graphcache"]
        assert said == [f"the plan has 6 steps, this generation {steps}: {how}" for steps in (9, 4)]


@foreign_fault
def test_magcache_wants_ratios_of_the_model_and_the_number_of_steps() -> None:
    """At another number it says nothing and starts over in the middle of the generation, or ends early."""
    with pytest.raises(ValueError, match="`mag_ratios` must be provided"):
        hooks.MagCacheConfig()
    pipe = WAN.make()
    pipe.transformer.enable_cache(magnitudes(6))
    made = decisions(pipe.transformer)
    WAN.generate(pipe, 8, guided=False)
    assert "".join(made) == "##..#.##"
    pipe = WAN.make()
    pipe.transformer.enable_cache(magnitudes(8))
    made = decisions(pipe.transformer)
    WAN.generate(pipe, 8, guided=False)
    assert "".join(made) == "###..#.."


def test_an_interrupted_generation_leaves_nothing_in_the_next() -> None:
    """vllm-omni #2194 and #7335, sglang #17140, cache-dit #540: the state of one request is in another."""
    fresh = WAN.generate(transformed(WAN, FORA), STEPS)
    pipe = transformed(WAN, FORA)
    interrupt(WAN, pipe)
    assert_same(WAN.generate(pipe, STEPS), fresh)


def test_a_loop_without_a_pipeline_may_be_given_up_too() -> None:
    model = subject("wan").transform(FORA)
    fresh = generation(model)
    kwargs = CASE.kwargs()
    for step in range(4):
        model(**{**kwargs, "timestep": CASE.clock(1 - step / STEPS, 2)})
    assert_same(generation(model), fresh)


@foreign_fault
@pytest.mark.parametrize("config", [lambda: first_block(0.5), magnitudes, forecasts])
def test_an_interrupted_generation_of_diffusers_hooks_is_in_the_next(config: Callable[[], Any]) -> None:
    """Pipelines reset the hooks at their end, which an interrupted one does not come to."""
    pipe = WAN.make()
    pipe.transformer.enable_cache(config())
    fresh = WAN.generate(pipe, STEPS)
    interrupt(WAN, pipe)
    assert deviation(WAN.generate(pipe, STEPS), fresh) > 0.1


@foreign_fault
def test_cache_dit_without_a_pipeline_begins_with_the_last_requests_features(cache_dit: Any) -> None:
    """Even where it is told the number of steps, which it looks at a step too late.

    The first step of a request has nothing of its own to reuse; refresh_context before each one helps.
    """
    model: Any = CASE.make()
    made = decisions(model)
    most = {"max_warmup_steps": 2, "max_continuous_cached_steps": 2}
    dbcache(cache_dit, model, num_inference_steps=STEPS, residual_diff_threshold=1e9, **most)
    first, second = generation(model), generation(model)
    assert ("".join(made[:STEPS]), "".join(made[STEPS:])) == ("##..#.", ".##..#")
    assert deviation(first, second) > 1e-3
    cache_dit.refresh_context(model, num_inference_steps=STEPS)
    assert_same(generation(model), first)


def test_a_call_needs_no_context() -> None:
    """diffusers #12012, #11180, #12760: "No context is set"."""
    model = subject("wan").transform(presets.compute(1))
    assert_same(model(**CASE.kwargs()), CASE.make()(**CASE.kwargs()))


@foreign_fault
@pytest.mark.parametrize("config", [first_block, forecasts])
def test_diffusers_hooks_need_a_context(config: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="No cache context is set"):
        hooked(config())(**CASE.kwargs())


def test_bytes_are_known_before_the_run_and_freed_by_it() -> None:
    """diffusers #10163, TaylorSeer #5: memory grows, nobody knows how far."""
    plan = presets.taylorseer(STEPS)
    model: Any = subject("wan").transform(plan)
    program = engine_of(model).prepare(CASE.call(CASE.static(2), CASE.latents(2), 1.0))
    schedule = program.schedule(plan)
    size = program.entry_bytes(schedule)
    foretold = [schedule.held(step, size) for step in range(STEPS)]
    measured = []

    def call(**kwargs: Any) -> Any:
        result = model(**kwargs)
        (branch,) = model.summary().branches
        assert branch.peak_bytes == schedule.peak(size) + branch.hoisted_bytes
        measured.append(branch.held_bytes)
        return result

    generation(call)
    (branch,) = model.summary().branches
    assert measured == [*(held + branch.hoisted_bytes for held in foretold[:-1]), 0]
    assert max(measured) <= branch.peak_bytes
    assert model.summary().held_bytes == 0


def bytes_of(*found: Any) -> int:
    """Of the tensors within these objects of diffusers or cache-dit, their containers followed."""
    todo, sizes, seen = list(found), dict[int, int](), set[int]()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            sizes[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, (dict, list, tuple)):
            todo.extend(item.values() if isinstance(item, dict) else item)
        elif "State" in type(item).__name__ or "Context" in type(item).__name__:
            todo.extend(vars(item).values())
    return sum(sizes.values())


def held_by_hooks(model: nn.Module) -> int:
    return bytes_of(*(value for hook in hooks_of(model) for value in vars(hook).values()))


@foreign_fault
@pytest.mark.parametrize("config", [first_block, magnitudes, broadcast, forecasts])
def test_diffusers_hooks_hold_what_no_step_will_read(config: Callable[[], Any]) -> None:
    """After a loop of one's own, and after a pipeline that was stopped."""
    model = hooked(config())
    generation(in_context(model))
    assert held_by_hooks(model) > 0
    pipe = WAN.make()
    pipe.transformer.enable_cache(config())
    interrupt(WAN, pipe)
    assert held_by_hooks(pipe.transformer) > 0


@foreign_fault
def test_cache_dit_holds_what_no_step_will_read(cache_dit: Any) -> None:
    """Even after a pipeline that came to its end."""
    pipe = dbcache(cache_dit, local(WAN.make()), num_inference_steps=STEPS)
    WAN.generate(pipe, STEPS)
    assert bytes_of(pipe.transformer._context_manager) > 0


RANKS = (slice(1), slice(1, None))
"""Two ranks with a sample each; they meet at every block that is computed."""


def test_ranks_run_the_same_phases_whatever_their_samples() -> None:
    """vllm-omni #6180 and #6228, cache-dit #375: ranks decide differently and wait for each other."""
    followed = []
    for rows in RANKS:
        model: Any = subject("wan", batch=1).transform(FORA)
        generation(model, rows=rows)
        followed.append([step.phase for step in model.summary().branches[0].steps])
    assert followed == [[0, 1, 1, 0, 1, 1]] * 2


@foreign_fault
def test_ranks_of_a_first_block_cache_skip_different_steps(cache_dit: Any) -> None:
    """At the same threshold; where blocks communicate, one rank is in a collective and the other is not."""
    of_diffusers, of_cache_dit = [], []
    for rows in RANKS:
        model = hooked(first_block())
        made = decisions(model)
        generation(in_context(model), 8, rows)
        of_diffusers.append("".join(made))
        model = CASE.make()
        made = decisions(model)
        generation(dbcache(cache_dit, model), 8, rows)
        of_cache_dit.append("".join(made))
    assert of_diffusers[0] != of_diffusers[1]
    assert of_cache_dit[0] != of_cache_dit[1]


FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
SAMPLERS: dict[str, Callable[[], Any]] = {
    "Euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "Heun": diffusers.FlowMatchHeunDiscreteScheduler,
}


def with_sampler(tiny_pipe: TinyPipeline, model: nn.Module, sampler: Callable[[], Any]) -> TinyPipeline:
    """The pipeline around this very model."""
    pipe = tiny_pipe.make()
    components = {**pipe.components, "transformer": model}
    return replace(tiny_pipe, build=lambda: type(pipe)(**{**components, "scheduler": sampler()}))


def add_lora(model: Any) -> None:
    torch.manual_seed(0)
    model.add_adapter(
        LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    )


def test_a_lora_and_other_samplers_in_the_middle_of_a_session() -> None:
    """ComfyUI-TeaCache #62, #103, #163: a LoRA or another sampler blurs the result or stops the motion."""
    sana = PIPELINES["sana"]
    pipe = graphcache.transform(sana.make(), FORA)
    plan_for = functools.partial(presets.resample, FORA)
    results = []
    for lora in (False, True):
        model = sana.make().transformer
        for changed in (model, pipe.transformer) if lora else ():
            add_lora(changed)
        for sampler in SAMPLERS.values():
            pipe.scheduler = sampler()
            results.append(sana.generate(pipe, STEPS))
            assert_same(results[-1], reference(with_sampler(sana, model, sampler), plan_for, steps=STEPS))
    assert len({tuple(result.flatten().tolist()) for result in results}) == 2 * len(SAMPLERS)


@foreign_fault
def test_magcache_takes_the_evaluations_of_heun_for_steps() -> None:
    """It starts over at the seventh of eleven, in the middle of a step and of the video."""
    pipe = WAN.make()
    pipe.scheduler = SAMPLERS["Heun"]()
    pipe.transformer.enable_cache(magnitudes())
    made = decisions(pipe.transformer)
    WAN.generate(pipe, STEPS, guided=False)
    assert "".join(made) == "##..#." + "##..#"


def test_a_sample_does_not_depend_on_its_neighbour() -> None:
    """nunchaku #596. Up to what matrix products of another size round."""
    together, alone = subject("wan").transform(FORA), subject("wan", batch=1).transform(FORA)
    assert deviation(generation(together)[:1], generation(alone, rows=slice(1))) < 1e-5


@foreign_fault
def test_a_sample_of_a_first_block_cache_depends_on_its_neighbour(cache_dit: Any) -> None:
    """One decision is made for the whole batch, from its mean."""
    makers = lambda: in_context(hooked(first_block())), lambda: dbcache(cache_dit, CASE.make())
    for make in makers:
        alone, together = generation(make(), 8, slice(1)), generation(make(), 8)
        assert deviation(together[:1], alone) > 0.1


class Unseen(nn.Module):
    """A transformer in nobody's list: attention over channels, the gate from a table."""

    def __init__(self, dim: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, dim), nn.Linear(dim, 4)
        self.gates = nn.Embedding(10, dim)
        self.trunk = nn.ModuleDict({f"stage{i}": nn.Linear(dim, 4 * dim) for i in range(depth)})
        self.back = nn.ModuleDict({f"stage{i}": nn.Linear(2 * dim, dim) for i in range(depth)})

    def forward(self, tokens: Tensor, timestep: Tensor) -> Tensor:
        x, gate = self.enter(tokens), self.gates(timestep)[:, None]
        for name, project in self.trunk.items():
            q, k, v, rest = project(F.rms_norm(x, x.shape[-1:])).chunk(4, dim=-1)
            mixed = torch.softmax(q.mT @ k / 8, dim=-1) @ v.mT
            x = x + torch.tanh(gate) * self.back[name](torch.cat([mixed.mT, F.silu(rest)], dim=-1))
        return self.leave(x)


def unseen() -> tuple[Unseen, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    steps = [{"tokens": torch.randn(2, 3, 4), "timestep": torch.full((2,), 9 - t)} for t in range(STEPS)]
    return Unseen().eval(), steps


def test_a_model_that_nobody_has_seen_is_cached_as_it_is() -> None:
    """What every repository is asked for most: support of one more model."""
    model, steps = unseen()
    plan = presets.taylorseer(STEPS)
    run = Reference(capture_call(model, steps[0], "timestep"), plan)
    made: Any = graphcache.transform(model, plan)
    for kwargs in steps:
        assert_same(made(**kwargs), run(runner_tensors(model, kwargs)))
    assert [step.forecast for step in made.summary().branches[0].steps] == [0, 2, 2, 0, 2, 2]


@foreign_fault
def test_a_model_that_nobody_has_seen_is_refused_or_left_alone_elsewhere(cache_dit: Any) -> None:
    model, steps = unseen()
    expected = model(**steps[0])
    with pytest.raises(ValueError, match="Unseen is not officially supported"):
        cache_dit.enable_cache(model, cache_config=cache_dit.DBCacheConfig())
    with pytest.raises(IndexError, match="pop from empty list"):
        hooks.apply_first_block_cache(model, first_block())
    hooks.apply_mag_cache(model, magnitudes())
    hooks.apply_taylorseer_cache(model, hooks.TaylorSeerCacheConfig())
    hooks.apply_pyramid_attention_broadcast(model, broadcast())
    for _ in range(STEPS):
        assert_same(model(**steps[0]), expected)
    assert hooks_of(model) == []


@foreign_fault
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "sana"])
def test_diffusers_has_models_without_its_caches(name: str) -> None:
    """Which are cached here as any other, see test_semantics.py."""
    assert not hasattr(CASES[name].make(), "enable_cache")


@foreign_fault
@pytest.mark.parametrize("name", ["wan", "cogvideox", "ltx", "mochi"])
def test_taylorseer_of_diffusers_hooks_nothing_and_says_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its default names of modules are those of FLUX; nothing is cached."""
    model: Any = CASES[name].make()
    model.enable_cache(hooks.TaylorSeerCacheConfig())
    assert model.is_cache_enabled
    assert hooks_of(model) == []
    assert warnings_of("diffusers", caplog) == []


def offload(model: nn.Module) -> None:
    cpu_offload_with_hook(model, execution_device="cpu")


@pytest.mark.parametrize("first", ["offloading", "plan"])
def test_offloading_goes_around_the_cached_model(first: str) -> None:
    """cache-dit #443."""
    pipe = PIXART.make()
    expected = reference(PIXART, functools.partial(presets.resample, FORA), steps=STEPS)
    if first == "offloading":
        offload(pipe.transformer)
    graphcache.transform(pipe, FORA)
    if first == "plan":
        offload(pipe.transformer)
    for _ in range(2):
        assert_same(PIXART.generate(pipe, STEPS), expected)
