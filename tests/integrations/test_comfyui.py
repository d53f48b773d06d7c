"""The node for ComfyUI, in a stand-in for its engine: right pictures, or a word about plain ones."""

import gc
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from comfy_engine import (
    Batched,
    Cond,
    Denoiser,
    Guider,
    Patcher,
    euler,
    heun,
    levels,
    loaded,
    midpoint,
    noise,
    texts,
)
from graphcache import GraphCacheError, Plan, PlanError
from graphcache.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, GraphCache
from graphcache.integrations.denoiser_call import core
from graphcache.runtime.session import Session
from inside import engine_of

STEPS = 6
TEXT = "plan steps=6 preset=none\nt = taylorseer order=1\n@self #.#t.#\n@mlp #.##.."
PLAN = Plan.parse(TEXT)
COMPUTE = "compute:6"
Conds = Sequence[Sequence[Cond]]


@pytest.fixture(autouse=True)
def inference() -> Any:
    """As ComfyUI runs its nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture
def patcher() -> Patcher:
    return loaded()


@pytest.fixture
def conds() -> Conds:
    return [texts(0), texts(1)]


def under(patcher: Patcher, plan: str = TEXT) -> Patcher:
    (made,) = GraphCache().apply(patcher, plan=plan)
    return made  # type: ignore[no-any-return]


def sampled(
    patcher: Patcher,
    conds: Conds,
    batched: Batched = True,
    sampler: Callable[..., Tensor] = euler,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    return Guider(patcher, conds, batched=batched).sample(noise(seed), sampler, levels(steps))


class Direct:
    """The oracle: the same calls in contexts of a session of graphcache, named by hand.

    It is a denoiser wrapper without the node: contexts are named by the conditionings, steps are counted.
    """

    def __init__(self, plan: Plan = PLAN) -> None:
        self.plan = plan
        self.model: Any = None
        self.steps: list[float] = []

    def sample(self, chain: Any, *args: Any) -> Any:
        self.steps = []
        denoiser = chain.class_obj.model_patcher.model.diffusion_model
        if self.model is None:
            self.model = graphcache.transform(
                core(denoiser, Denoiser._forward), self.plan, watch="everything"
            )
        with self.model.session():
            return chain(*args)

    def denoise(self, chain: Any, x: Tensor, t: Tensor, context: Tensor, control: Any, options: Any) -> Any:
        sigma = float(options["sigmas"][0])
        if sigma not in self.steps:
            self.steps.append(sigma)
        name = f"{options['cond_or_uncond']} {options['uuids']}"
        given = {"sigmas": options["sigmas"]} | {k: v for k, v in options.items() if k == "scale"}
        steps = len(options["sample_sigmas"]) - 1
        with self.model.cache_context(name, step_index=len(self.steps) - 1, num_inference_steps=steps):
            return self.model(x=x, timestep=t, context=context, control=control, transformer_options=given)


def direct(patcher: Patcher, plan: Plan = PLAN) -> Patcher:
    made, oracle = patcher.clone(), Direct(plan)
    made.add_wrapper_with_key("outer_sample", "direct", oracle.sample)
    made.add_wrapper_with_key("diffusion_model", "direct", oracle.denoise)
    return made


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the library's log has warned of."""
    return [record.message for record in caplog.records if record.name == "graphcache"]


def test_the_node_is_what_comfyui_looks_for() -> None:
    assert "comfy" not in sys.modules
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()["required"]
        assert inputs["model"] == ("MODEL",)
        assert node.RETURN_TYPES == ("MODEL",)
        assert callable(getattr(node, node.FUNCTION))
        assert isinstance(node.CATEGORY, str)
        assert set(graphcache.presets.names()) == set(inputs["preset"][0])


SWITCHES: dict[str, Batched] = {
    "one batch": True,
    "one after the other": False,
    "changing once": lambda step: step < 3,
    "back and forth": lambda step: step % 2 == 0,
}


@pytest.mark.parametrize("batched", SWITCHES.values(), ids=SWITCHES)
def test_pictures_are_those_of_named_contexts(patcher: Patcher, conds: Conds, batched: Batched) -> None:
    expected = sampled(direct(patcher), conds, batched)
    assert torch.equal(sampled(under(patcher), conds, batched), expected)
    reuses = batched is not SWITCHES["back and forth"]  # there no batch is evaluated twice in a row
    assert torch.equal(sampled(patcher, conds, batched), expected) is not reuses


@pytest.mark.parametrize("batched", [True, SWITCHES["back and forth"]])
def test_computing_everything_gives_the_untouched_pictures(
    patcher: Patcher, conds: Conds, batched: Batched
) -> None:
    assert torch.equal(sampled(under(patcher, COMPUTE), conds, batched), sampled(patcher, conds, batched))


def test_several_prompts_and_areas(patcher: Patcher) -> None:
    left, right, whole = texts(2, 3, 4)
    left.area, right.area = slice(0, 3), slice(3, 6)
    conds = [[left, right, whole], texts(1)]
    for batched in (True, False):
        expected = sampled(direct(patcher), conds, batched)
        assert torch.equal(sampled(under(patcher), conds, batched), expected)


def test_a_prompt_that_begins_late_begins_caches_of_its_own(patcher: Patcher) -> None:
    late, always = texts(2, 3)
    late.start = 0.6
    conds = [[late, always], texts(1)]
    assert torch.equal(sampled(under(patcher), conds), sampled(direct(patcher), conds))


def test_a_control_network_counts_at_every_step(patcher: Patcher) -> None:
    def control(x: Tensor, sigma: Tensor) -> dict[str, Any]:
        return {"output": [0.1 * x.repeat(2, 1, 1) * sigma, None]}

    conds = [texts(0), texts(1)]
    for cond in (*conds[0], *conds[1]):
        cond.control = control
    assert torch.equal(sampled(under(patcher), conds), sampled(direct(patcher), conds))
    assert torch.equal(sampled(under(patcher, COMPUTE), conds), sampled(patcher, conds))


def test_runs_one_after_the_other_begin_anew(patcher: Patcher, conds: Conds) -> None:
    cached = under(patcher)
    once = [sampled(cached, conds, seed=seed) for seed in range(2)]
    again = [sampled(under(patcher), conds, seed=seed) for seed in range(2)]
    assert all(map(torch.equal, once, again))


def test_nodes_over_one_model_do_not_know_of_each_other(patcher: Patcher, conds: Conds) -> None:
    other = TEXT.replace("#.##..", "#.#.#.")
    one, two = under(patcher), under(patcher, other)
    first, second = sampled(one, conds), sampled(two, conds)
    assert not torch.equal(first, second)
    assert torch.equal(sampled(one, conds), first)
    assert torch.equal(second, sampled(direct(patcher, Plan.parse(other)), conds))


def test_a_node_behind_another_replaces_its_plan(patcher: Patcher, conds: Conds) -> None:
    twice = under(under(patcher, "fora:6:interval=2"))
    assert torch.equal(sampled(twice, conds), sampled(direct(patcher), conds))


def test_a_cancelled_run_leaves_nothing(patcher: Patcher, conds: Conds) -> None:
    class Cancelled(Exception):
        pass

    def cancelled(denoised: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
        for sigma in sigmas[:3]:
            x = denoised(x, sigma)
        raise Cancelled

    cached = under(patcher)
    guider = Guider(cached, conds)
    before = guider.model_options
    with pytest.raises(Cancelled):
        guider.sample(noise(), cancelled, levels(STEPS))
    assert guider.model_options is before
    assert torch.equal(sampled(cached, conds), sampled(direct(patcher), conds))


@pytest.mark.usefixtures("own_garbage")
def test_a_run_frees_its_caches(patcher: Patcher, conds: Conds) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def watched(denoised: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
        result = euler(denoised, x, sigmas[:4])
        seen.extend(_cached())
        return result

    made = under(patcher)
    Guider(made, conds).sample(noise(), watched, levels(STEPS))
    gc.collect()
    assert seen
    assert not [entry for entry in seen if entry() is not None]


def _cached() -> list["weakref.ref[Tensor]"]:
    """The entries of every open session."""
    sessions = [item for item in gc.get_objects() if type(item) is Session and item.opened]
    states = [state for session in sessions for state in session.states.values()]
    held = [entries for state in states for entries in state.cache.entries.values()]
    return [weakref.ref(part) for entries in held for entry in entries for part in entry]


def _changed_in_place(denoiser: Any) -> None:
    denoiser.blocks[0].up.weight.mul_(1.5)


def _exchanged(denoiser: Any) -> None:
    weight = denoiser.blocks[0].up.weight
    denoiser.blocks[0].up.weight = nn.Parameter(weight * 1.5, requires_grad=False)


@pytest.mark.parametrize("change", [_changed_in_place, _exchanged])
def test_weights_that_change_between_runs(
    patcher: Patcher, conds: Conds, change: Callable[[Any], None]
) -> None:
    cached = under(patcher)
    sampled(cached, conds)
    change(patcher.model.diffusion_model)
    assert torch.equal(sampled(cached, conds), sampled(direct(patcher), conds))


def test_weights_that_change_between_the_calls_of_a_step(patcher: Patcher, conds: Conds) -> None:
    """Conditionings with hooks have adapters of their own."""
    weight = patcher.model.diffusion_model.blocks[0].up.weight

    def use(factor: float) -> Callable[[Any], None]:
        def hook(denoiser: Any) -> None:
            denoiser.blocks[0].up.weight = nn.Parameter(weight * factor, requires_grad=False)

        return hook

    conds[0][0].hook, conds[1][0].hook = use(1.5), use(0.5)
    assert torch.equal(sampled(under(patcher, COMPUTE), conds), sampled(patcher, conds))


def test_another_number_of_steps(patcher: Patcher, conds: Conds, caplog: pytest.LogCaptureFixture) -> None:
    cached = under(patcher)
    sampled(cached, conds)
    assert torch.equal(sampled(cached, conds, steps=9), sampled(direct(patcher), conds, steps=9))
    assert "the plan has 6 steps, this generation 9" in caplog.text


def test_a_preset_is_made_for_the_steps_of_the_first_run(
    patcher: Patcher, conds: Conds, caplog: pytest.LogCaptureFixture
) -> None:
    (made,) = GraphCache().apply(patcher, "fora", 3)
    plan = graphcache.presets.fora(STEPS, 3)
    assert torch.equal(sampled(made, conds), sampled(direct(patcher, plan), conds))
    assert not said(caplog)


def test_a_run_in_the_middle_of_a_schedule_is_a_run_of_its_own(patcher: Patcher, conds: Conds) -> None:
    sigmas = levels(9)[3:]
    expected = Guider(direct(patcher), conds).sample(noise(), euler, sigmas)
    assert torch.equal(Guider(under(patcher), conds).sample(noise(), euler, sigmas), expected)


def test_a_second_evaluation_at_a_step_ends_the_plan(
    patcher: Patcher, conds: Conds, caplog: pytest.LogCaptureFixture
) -> None:
    made = under(patcher, COMPUTE)
    assert torch.equal(sampled(made, conds, sampler=heun), sampled(patcher, conds, sampler=heun))
    assert caplog.text.count("more than once at step 1") == 1
    caplog.clear()
    assert torch.equal(sampled(made, conds), sampled(patcher, conds))
    assert not said(caplog)


def test_evaluations_between_the_steps_are_computed_plainly(
    patcher: Patcher, conds: Conds, caplog: pytest.LogCaptureFixture
) -> None:
    """Those at the steps go on as if the others had not been: as the oracle has it, which sees them alone."""
    made = under(patcher, COMPUTE)
    assert torch.equal(sampled(made, conds, sampler=midpoint), sampled(patcher, conds, sampler=midpoint))
    assert caplog.text.count("noise levels that are not in its schedule") == 1

    class OnSteps(Direct):
        def denoise(self, chain: Any, *args: Any) -> Any:
            options = args[-1]
            on = bool((options["sample_sigmas"] == options["sigmas"][0]).any())
            return super().denoise(chain, *args) if on else chain(*args)

    oracle, expected = OnSteps(), patcher.clone()
    expected.add_wrapper_with_key("outer_sample", "direct", oracle.sample)
    expected.add_wrapper_with_key("diffusion_model", "direct", oracle.denoise)
    assert torch.equal(
        sampled(under(patcher), conds, sampler=midpoint), sampled(expected, conds, sampler=midpoint)
    )


def test_tiles_under_one_prompt_are_computed_plainly(
    patcher: Patcher, conds: Conds, caplog: pytest.LogCaptureFixture
) -> None:
    def tiled(denoised: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
        def tiles(x: Tensor, sigma: Tensor) -> Tensor:
            return torch.cat([denoised(tile, sigma) for tile in x.chunk(2, dim=1)], dim=1)

        return euler(tiles, x, sigmas)

    plain = sampled(patcher, conds, sampler=tiled)
    assert torch.equal(sampled(under(patcher), conds, sampler=tiled), plain)
    assert "more than once at step 0" in caplog.text


def test_patches_within_the_model_are_run_and_not_captured(
    patcher: Patcher, conds: Conds, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def patch(x: Tensor, gate: Tensor) -> Tensor:
        calls.append(1)
        return x + gate

    made = under(patcher)
    made.model_options["transformer_options"]["patches_replace"] = {"dit": {0: patch}}
    plain = patcher.clone()
    plain.model_options = made.model_options
    expected = sampled(plain, conds)
    calls.clear()
    assert torch.equal(sampled(made, conds), expected)
    assert len(calls) == STEPS
    assert caplog.text.count("transformer_options['patches_replace']: functions or objects") == 1


def test_plain_options_are_those_of_the_call(patcher: Patcher, conds: Conds) -> None:
    made, expected = under(patcher), direct(patcher)
    for each in (made, expected):
        each.model_options["transformer_options"]["scale"] = 0.5
    assert torch.equal(sampled(made, conds), sampled(expected, conds))
    assert not torch.equal(sampled(made, conds), sampled(under(patcher), conds))


@pytest.mark.parametrize("first", [True, False])
def test_wrappers_of_other_nodes_stand_around_the_plan(patcher: Patcher, conds: Conds, first: bool) -> None:
    def doubled(chain: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return 2 * chain(x, *args, **kwargs)

    def with_other(patcher: Patcher) -> Patcher:
        made = patcher.clone()
        made.add_wrapper_with_key("diffusion_model", "other", doubled)
        return made

    made = under(with_other(patcher)) if first else with_other(under(patcher))
    assert torch.equal(sampled(made, conds), sampled(direct(with_other(patcher)), conds))


@pytest.mark.parametrize("name", ["uuids", "cond_or_uncond", "sample_sigmas"])
def test_a_model_that_asks_which_call_it_is_is_refused(patcher: Patcher, conds: Conds, name: str) -> None:
    def asks(
        self: Any, x: Tensor, timestep: Tensor, context: Tensor, control: Any, transformer_options: Any
    ) -> Any:
        return x * len(transformer_options.get(name))

    denoiser: Any = patcher.model.diffusion_model
    denoiser.__class__ = type("Asking", (Denoiser,), {"_forward": asks})
    with pytest.raises(GraphCacheError, match=f"looks at transformer_options\\['{name}'\\]"):
        sampled(under(patcher), conds)


def test_a_model_without_wrappers_is_told_so(
    patcher: Patcher, conds: Conds, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser: Any = patcher.model.diffusion_model
    denoiser.__class__ = type("Bare", (Denoiser,), {"forward": Denoiser._forward})
    assert torch.equal(sampled(under(patcher), conds), sampled(patcher, conds))
    assert "the plan was not followed" in caplog.text


def test_a_call_outside_of_a_run_is_computed_plainly(
    patcher: Patcher, conds: Conds, caplog: pytest.LogCaptureFixture
) -> None:
    made = under(patcher)
    options = {"wrappers": made.wrappers}
    x, t, text = noise(), torch.ones(1), conds[0][0].text
    found = made.model.diffusion_model(x, t, context=text, transformer_options=options)
    assert torch.equal(found, made.model.diffusion_model(x, t, context=text, transformer_options={}))
    assert "outside of a sampler's run" in caplog.text


def test_plans_are_typed_or_read(patcher: Patcher, conds: Conds, tmp_path: Any) -> None:
    path = tmp_path / "plan.txt"
    PLAN.save(path)
    assert torch.equal(sampled(under(patcher, str(path)), conds), sampled(under(patcher), conds))
    before = GraphCache.IS_CHANGED("fora", 3, str(path))
    Plan.parse(TEXT.replace("#.##..", "######")).save(path)
    assert GraphCache.IS_CHANGED("fora", 3, str(path)) != before


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("nowhere.txt", "nowhere.txt"),
        ("fora:6:every=3", "takes interval, not 'every'"),
        ("fastercache:6", "row guidance"),
        ("plan steps=6\n@self ##", "."),
    ],
)
def test_what_cannot_be_followed_is_refused_by_the_node(patcher: Patcher, plan: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        under(patcher, plan)


def test_the_summary_of_a_run_is_in_the_log(
    patcher: Patcher, conds: Conds, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "graphcache")
    sampled(under(patcher), conds)
    assert "6 of 6 steps" in caplog.text


def test_later_runs_find_what_was_captured(patcher: Patcher, conds: Conds) -> None:
    captured: list[Any] = []
    made = under(patcher)
    wrappers = made.wrappers["diffusion_model"]["graphcache"][0].__self__  # type: ignore[attr-defined]
    for _ in range(2):
        sampled(made, conds)
        (models,) = wrappers._models.values()
        (model,) = models.values()
        captured.append([*engine_of(model).maker.programs.values()])
    assert captured[0] == captured[1]
    assert len(captured[0]) == 1
