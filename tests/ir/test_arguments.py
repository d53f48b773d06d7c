"""Latents and timesteps wherever a model takes them: held against the model itself and the reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, GraphCacheError, Plan, PlanError, StateError, presets
from graphcache.ir.graph import Input
from inside import only_program, programs_of
from reference import Reference, assert_same, capture_call, runner_tensors
from tiny import TinyDiT, tiny

STEPS = 4
TIMES = (1.0, 0.7310585786300049, 0.4, 0.1)
CACHING = Plan.parse(f"plan steps={STEPS} preset=none\n@mlp #.#.\n@self ##..")
EAGER = presets.compute(STEPS)


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


class Plain(TinyDiT):
    """One of the classes below, each of which takes its arguments in another way."""

    def plain(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return TinyDiT.forward(self, x, time, text)


class Listed(Plain):
    """Samples of differing sizes one after the other, as models for pictures of any size take them."""

    def forward(self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor]) -> list[Tensor]:
        texts = torch.cat(cap_feats)
        return [self.plain(one[None], t[:1], texts[i : i + 1])[0] for i, one in enumerate(x)]


class Named(Plain):
    """Two latents in a dict."""

    def forward(self, latents: dict[str, Tensor], sigma: Tensor, text: Tensor) -> dict[str, Tensor]:
        whole = self.plain(torch.cat([latents["video"], latents["audio"]], dim=1), sigma, text)
        count = latents["video"].shape[1]
        return {"video": whole[:, :count], "audio": whole[:, count:]}


class Bundled(Plain):
    """Everything in one dict."""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.plain(batch["noisy"], batch["cond"]["t"], batch["cond"]["text"])


@dataclass
class State:
    text: Tensor
    z: Tensor
    timesteps: Tensor


class Recorded(Plain):
    def forward(self, state: State) -> Tensor:
        return self.plain(state.z, state.timesteps, state.text)


class Discrete(Plain):
    """Latents are token ids."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.embed = nn.Embedding(16, 4)

    def forward(self, input_ids: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return self.plain(self.embed(input_ids), timesteps.float(), text)


class TwoTimes(Plain):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, timestep_r: Tensor) -> Tensor:
        return self.plain(x, timestep - timestep_r, text)


class Numbered(Plain):
    """As models of the web do it: a number becomes a tensor within forward."""

    def forward(self, x: Tensor, t: Any, text: Tensor) -> Tensor:
        return self.plain(x, torch.tensor([t], dtype=x.dtype).expand(2), text) * (t / 3)


class Untimed(Plain):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.plain(x, x.mean(dim=(1, 2)), text)


TEXT = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def latents(step: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def full(step: int) -> Tensor:
    return torch.full((2,), TIMES[step])


CALLS: dict[str, tuple[type[TinyDiT], Callable[[int], dict[str, Any]]]] = {
    "list": (
        Listed,
        lambda i: {
            "x": [latents(i, 3, 4), latents(i, 5, 4)],
            "t": full(i),
            "cap_feats": [TEXT[:1], TEXT[1:]],
        },
    ),
    "dict": (
        Named,
        lambda i: {
            "latents": {"video": latents(i, 2, 3, 4), "audio": latents(i, 2, 2, 4)},
            "sigma": full(i),
            "text": TEXT,
        },
    ),
    "bundle": (
        Bundled,
        lambda i: {"batch": {"noisy": latents(i, 2, 3, 4), "cond": {"t": full(i), "text": TEXT}}},
    ),
    "record": (Recorded, lambda i: {"state": State(TEXT, latents(i, 2, 3, 4), full(i))}),
    "tokens": (
        Discrete,
        lambda i: {
            "input_ids": latents(i, 2, 3).mul(4).long().clamp(0, 15),
            "timesteps": full(i),
            "text": TEXT,
        },
    ),
    "two times": (
        TwoTimes,
        lambda i: {"x": latents(i, 2, 3, 4), "timestep": full(i), "text": TEXT, "timestep_r": full(i) / 3},
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {"record": {"latents": "state.z"}}


def kinds(model: Any) -> dict[str, str]:
    """What every tensor of the latest call was taken for."""
    program = only_program(model)
    return {port.name: port.kind for port in program.captured.step.inputs if isinstance(port, Input)}


@pytest.mark.parametrize("name", CALLS)
def test_a_generation_is_the_models_own_and_under_a_plan_the_references(name: str) -> None:
    kind, call = CALLS[name]
    model = tiny(2, kind)
    exact = graphcache.transform(model, EAGER, **OPTIONS.get(name, {}))
    for _ in range(2):
        for step in range(STEPS):
            assert_same(exact(**call(step)), model(**call(step)))
    cached = graphcache.transform(model, CACHING, **OPTIONS.get(name, {}))
    run = Reference(capture_call(model, call(0), None), CACHING)
    for step in range(STEPS):
        assert_same(cached(**call(step)), run(runner_tensors(model, call(step))))
    assert len(programs_of(cached)) == 1
    (branch,) = cached.summary().branches
    sites = 4 if name != "list" else 8
    assert [row.reused for row in branch.steps] == [0, sites // 2, sites // 2, sites]


KINDS = {
    "list": {"x[0]": "latent", "x[1]": "latent", "t": "timestep"},
    "dict": {"latents.video": "latent", "latents.audio": "latent", "sigma": "timestep"},
    "bundle": {"batch.noisy": "latent", "batch.cond.t": "timestep"},
    "record": {"state.z": "latent", "state.timesteps": "timestep"},
    "tokens": {"input_ids": "latent", "timesteps": "timestep"},
    "two times": {"x": "latent", "timestep": "timestep", "timestep_r": "timestep"},
}


@pytest.mark.parametrize("name", CALLS)
def test_latents_and_times_are_found(name: str) -> None:
    kind, call = CALLS[name]
    model = graphcache.transform(tiny(1, kind), EAGER, example_inputs=call(0), **OPTIONS.get(name, {}))
    found = kinds(model)
    assert {path: kind for path, kind in found.items() if kind != "constant"} == KINDS[name]
    assert "constant" in found.values()


@pytest.mark.parametrize("times", [TIMES, (999, 700, 400, 3)], ids=["float", "int"])
def test_a_number_for_a_timestep_is_captured_once_and_gives_the_models_bits(times: Any) -> None:
    model = tiny(2, Numbered)
    exact: Any = graphcache.transform(model, EAGER)
    for step, time in enumerate(times):
        x = latents(step, 2, 3, 4)
        assert_same(exact(x, time, TEXT), model(x, time, TEXT))
    assert len(programs_of(exact)) == 1
    assert kinds(exact) == {"x": "latent", "t": "timestep", "text": "constant"}


def test_a_number_tells_the_step_and_calls_of_one_step() -> None:
    model = tiny(1, Numbered)
    for wait in ("step", "never"):
        cached: Any = graphcache.transform(model, CACHING, wait=wait)
        for step, time in enumerate(TIMES):
            for context in ("cond", "uncond"):
                with cached.cache_context(context):
                    cached(latents(step, 2, 3, 4), time, TEXT)
        for branch in cached.summary().branches:
            assert [row.reused for row in branch.steps] == [0, 1, 1, 2]


class Deciding(Plain):
    def forward(self, x: Tensor, t: Any, text: Tensor) -> Tensor:
        return self.plain(x * 2 if t > 0.5 else x, torch.full((2,), float(t)), text)


class Calculating(Plain):
    def forward(self, x: Tensor, t: Any, text: Tensor) -> Tensor:
        return self.plain(x * math.cos(t), torch.full((2,), 1.0), text)


class Asking(Plain):
    """Computes something else with a number."""

    def forward(self, x: Tensor, t: Any, text: Tensor) -> Tensor:
        return self.plain(x * (2 if isinstance(t, float) else 3), torch.full((2,), 1.0) * t, text)


class Hating(Plain):
    def forward(self, x: Tensor, t: Any, text: Tensor) -> Tensor:
        return self.plain(
            x, torch.full((2,), {0.4: 1.0}.get(t, 2.0)) if hash(t) else x, text[: t.as_integer_ratio()[0]]
        )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Deciding, "test_arguments.py:.*in forward: `return self.plain\\(x \\* 2 if t > 0.5"),
        (Calculating, "test_arguments.py:.*math.cos"),
        (Asking, "computes other bits"),
        (Hating, "which forward takes as a number only because of .*test_arguments.py"),
    ],
)
def test_a_number_that_cannot_be_a_tensor_is_refused_with_advice(kind: type[TinyDiT], words: str) -> None:
    cached = graphcache.transform(tiny(1, kind), EAGER)
    with pytest.raises(CaptureError, match=f"(?s){words}.*Pass the timestep as a tensor"):
        cached(latents(0, 2, 3, 4), 0.7, TEXT)


def test_a_whole_number_that_is_a_size_stays_one() -> None:
    class Framed(Plain):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor, t: int) -> Tensor:
            return self.plain(x.reshape(2, t, 4), timestep, text)

    model = tiny(1, Framed)
    cached = graphcache.transform(model, EAGER)
    for step in range(STEPS):
        call = {"x": latents(step, 2, 12), "timestep": full(step), "text": TEXT, "t": 3}
        assert_same(cached(**call), model(**call))


def test_another_number_that_changes_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Progressing(Plain):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor, progress: float) -> Tensor:
            return self.plain(x * progress, timestep, text)

    cached = graphcache.transform(tiny(1, Progressing), CACHING)
    for step in range(2):
        cached(latents(step, 2, 3, 4), full(step), TEXT, step / STEPS)
    said = "\n".join(record.getMessage() for record in caplog.records if record.name == "graphcache")
    assert "argument progress is a number" in said
    assert "pass it as a tensor" in said


def test_a_released_model_that_takes_lists() -> None:
    model: Any = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    ).eval()
    texts = [latents(7, 5, 16), latents(8, 9, 16)]

    def call(step: int) -> dict[str, Any]:
        samples = [latents(step, 4, 1, 8, 8), latents(step, 4, 1, 8, 12)]
        return {"x": samples, "t": full(step), "cap_feats": texts, "return_dict": False}

    plan = Plan.parse(f"plan steps={STEPS} preset=none\n@self #.#.\n@mlp ##..")
    run = Reference(capture_call(model, call(0), None), plan)
    exact, cached = graphcache.transform(model, EAGER), graphcache.transform(model, plan)
    for step in range(STEPS):
        assert_same(exact(**call(step)), model(**call(step)))
        assert_same(cached(**call(step)), run(runner_tensors(model, call(step))))


def test_paths_name_what_is_not_found() -> None:
    class Other(Plain):
        def forward(self, context: Tensor, noisy: list[Tensor], clock: dict[str, Tensor]) -> Tensor:
            return self.plain(noisy[0] + noisy[1], clock["now"], context)

    model, kind = tiny(1, Other), {"timestep": "clock.now"}

    def call(step: int) -> dict[str, Any]:
        x = latents(step, 2, 3, 4)
        return {"context": TEXT, "noisy": [x, x / 2], "clock": {"now": full(step)}}

    for named, expected in (("noisy", ["noisy[0]", "noisy[1]"]), (["noisy[0]"], ["noisy[0]"])):
        cached = graphcache.transform(model, EAGER, latents=named, **kind)
        for step in range(STEPS):
            assert_same(cached(**call(step)), model(**call(step)))
        assert [path for path, kind in kinds(cached).items() if kind == "latent"] == expected
    assert graphcache.inspect(model, call(0), latents="noisy", **kind).roles
    with pytest.raises(CaptureError, match="latents='noise' names no tensor of this call, which has context"):
        graphcache.transform(model, EAGER, latents="noise", example_inputs=call(0), **kind)
    with pytest.raises(StateError, match=r"none of its arguments looks like a timestep.*context, noisy"):
        graphcache.transform(model, EAGER)(**call(0))


def test_without_a_timestep_calls_are_counted_or_a_scheduler_tells_the_step() -> None:
    model = tiny(1, Untimed)
    run = Reference(capture_call(model, {"x": latents(0, 2, 3, 4), "text": TEXT}, None), CACHING)
    expected = [run([latents(step, 2, 3, 4), TEXT]) for step in range(STEPS)]
    counted = graphcache.transform(model, CACHING, wait="never")
    for _ in range(2):
        assert_same([counted(latents(step, 2, 3, 4), TEXT) for step in range(STEPS)], expected)
    for kind in (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.DDIMScheduler):
        scheduler = kind()
        driven: Any = graphcache.transform(model, CACHING)
        for _ in range(2):
            scheduler.set_timesteps(STEPS)
            with driven.session(scheduler=scheduler):
                found = []
                for step, time in enumerate(scheduler.timesteps):
                    found.append(driven(latents(step, 2, 3, 4), TEXT))
                    scheduler.step(found[-1], time, latents(step, 2, 3, 4))
            assert_same(found, expected)
    with pytest.raises(
        StateError, match=r"no scheduler drives it.*transform\(..., wait='never'\).*has x, text"
    ):
        graphcache.transform(model, CACHING)(latents(0, 2, 3, 4), TEXT)


def test_without_a_timestep_branches_are_told_by_the_text() -> None:
    model, scheduler = tiny(1, Untimed), diffusers.DDIMScheduler()
    cached: Any = graphcache.transform(model, EAGER)
    scheduler.set_timesteps(STEPS)
    with cached.session(scheduler=scheduler):
        for step in range(STEPS):
            for text in (TEXT, TEXT / 2):
                x = latents(step, 2, 3, 4)
                assert_same(cached(x, text.clone()), model(x, text))
        assert [len(branch.steps) for branch in cached.summary().branches] == [STEPS] * 2


GUIDED = Plan.parse(f"plan steps={STEPS} preset=none conditional=last\nguidance #.#.\n@mlp ####")


def test_guidance_on_two_latents_that_are_both_doubled() -> None:
    kind, _ = CALLS["dict"]
    model = tiny(2, kind)
    cached = graphcache.transform(model, GUIDED)
    text, halves = torch.cat([TEXT, TEXT / 2]), []
    for step in range(STEPS):
        video, audio = latents(step, 2, 3, 4), latents(step, 2, 2, 4)
        whole = {"video": torch.cat([video] * 2), "audio": torch.cat([audio] * 2)}
        found = cached(whole, full(step).repeat(2), text)
        expected = model(whole, full(step).repeat(2), text)
        if step % 2 == 0:
            assert_same(found, expected)
        halves.append((found["video"].chunk(2), expected["video"].chunk(2)))
    old = halves[0][1]
    (unconditional, conditional), (_, own) = halves[1]
    torch.testing.assert_close(conditional, own)
    torch.testing.assert_close(unconditional, own + old[0] - old[1])


def test_guidance_on_a_list_that_holds_each_sample_twice_is_refused() -> None:
    kind, _ = CALLS["list"]
    x = latents(0, 3, 4)
    cached = graphcache.transform(tiny(1, kind), GUIDED)
    with pytest.raises(PlanError, match=r"a list that holds each sample twice.*cache_context"):
        cached([x, x.clone()], full(0), [TEXT[:1], TEXT[1:]])


def test_what_needs_one_tensor_of_latents_says_so() -> None:
    for name, words in (
        ("list", "one tensor.*x\\[0\\], x\\[1\\]"),
        ("tokens", "input_ids holds whole numbers"),
    ):
        kind, call = CALLS[name]

        def sample(model: Any, _: int, steps: int, call: Any = call) -> Tensor:
            return sum(model(**call(step))[0].sum() for step in range(steps))

        with pytest.raises(GraphCacheError, match=f"profile needs latents.*{words}"):
            graphcache.profile(tiny(1, kind), [1, 2], steps=STEPS, sampler=sample)
