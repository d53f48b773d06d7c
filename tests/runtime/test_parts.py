"""Pipelines whose denoisers are called otherwise, stand in inner pipelines, or have others beside them."""

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, GraphCacheError
from graphcache.runtime.parts import PipelinePart
from reference import assert_same
from tiny import TinyDiT, tiny
from tiny_pipeline import Pipeline


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


class Encoder(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


class Side(TinyDiT):
    """A network beside the denoiser, as a ControlNet is."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, control: Tensor) -> Tensor:  # type: ignore[override]
        return 0.1 * super().forward(x + control, timestep, text)


class Guided(TinyDiT):
    """A denoiser that takes what a side network made, or nothing."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        return super().forward(x if control is None else x + control, timestep, text)


class Halves(Pipeline):
    """Two denoisers a step, as where the unconditional branch has a model of its own."""

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        one, other = self.model_a(x, t, text), self.model_b(x, t, 0 * text)  # type: ignore[attr-defined]
        return other + 2 * (one - other)


class Beside(Pipeline):
    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(x, t, text, self.side(x, t, text, x))  # type: ignore[attr-defined,no-any-return]


class Outer:
    """Holds the model too, and leaves the work to two pipelines within."""

    def __init__(self) -> None:
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.prior_model, self.encoder = tiny(1), Encoder()
        self.first = Pipeline(transformer=self.prior_model)
        self.second = Pipeline(transformer=tiny(2))

    def __call__(self, steps: int) -> Tensor:
        return torch.cat([self.first(steps), self.second(steps)])


KINDS = {
    "two denoisers": lambda: Halves(model_a=tiny(1), model_b=tiny(2), text_encoder=Encoder()),
    "a network beside it": lambda: Beside(unet=tiny(1, Guided), side=tiny(2, Side)),
    "inner pipelines": Outer,
}
DENOISERS = {
    "two denoisers": ["model_a", "model_b"],
    "a network beside it": ["unet"],
    "inner pipelines": ["prior_model", "second.transformer"],
}

every_kind = pytest.mark.parametrize("kind", KINDS)


def at(pipe: Any, path: str) -> Any:
    for name in path.split("."):
        pipe = getattr(pipe, name)
    return pipe


def by_hand(kind: str, steps: int, actions: str) -> Tensor:
    """What the untouched pipeline gives if its denoisers' branches compute at `#` alone."""
    pipe = KINDS[kind]()
    for path in DENOISERS[kind]:
        calls, stored = [0], dict[nn.Module, Any]()

        def count(module: nn.Module, args: Any, output: Any, calls: list[int] = calls) -> None:
            calls[0] += 1

        def hold(
            module: nn.Module, args: Any, output: Any, calls: Any = calls, stored: Any = stored
        ) -> Tensor:
            if actions[calls[0]] == "#":
                stored[module] = output
            return stored[module]  # type: ignore[no-any-return]

        model = at(pipe, path)
        model.register_forward_hook(count)
        for block in model.blocks:
            block.out.register_forward_hook(hold)
            block.down.register_forward_hook(hold)
    return pipe(steps)


@every_kind
def test_denoisers_are_found_by_what_they_are_called_with(kind: str) -> None:
    plain, pipe = KINDS[kind](), KINDS[kind]()
    assert graphcache.transform(pipe, graphcache.presets.fora(6, interval=3)) is pipe
    assert_same(pipe(6), by_hand(kind, 6, "#..#.."))
    for path in DENOISERS[kind]:
        assert len(at(pipe, path).summary().branches[0].steps) == 6
    assert not torch.equal(pipe(6), plain(6))


class Unnamed(TinyDiT):
    """A denoiser of which some arguments have no names."""

    def forward(self, x: Tensor, timestep: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, timestep, *rest)


def test_where_one_denoiser_is_refused_all_stay_as_they_are() -> None:
    pipe = Halves(model_a=tiny(1), model_b=tiny(2, Unnamed), text_encoder=Encoder())
    before = dict(vars(pipe))
    with pytest.raises(CaptureError, match="takes \\*args"):
        graphcache.transform(pipe, graphcache.presets.fora(6))
    assert vars(pipe) == before


@every_kind
def test_everything_else_stays_as_it_is_and_all_is_restored(kind: str) -> None:
    pipe = KINDS[kind]()
    before = {path: at(pipe, path) for path in DENOISERS[kind]}
    others = {name: value for name, value in vars(pipe).items() if name not in DENOISERS[kind]}
    graphcache.transform(pipe, graphcache.presets.fora(6))
    assert all(getattr(pipe, name) is value for name, value in others.items())
    graphcache.restore(pipe)
    assert all(at(pipe, path) is model for path, model in before.items())
    assert_same(pipe(6), KINDS[kind]()(6))


def classes(of: str) -> list[type[nn.Module]]:
    """The model classes of a part of diffusers."""
    package = importlib.import_module(f"diffusers.models.{of}")
    names = [item.name for item in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    found = [item for name in names for item in vars(importlib.import_module(name)).values()]
    return sorted(
        {item for item in found if isinstance(item, type) and issubclass(item, ModelMixin)} - {ModelMixin},
        key=lambda item: item.__name__,
    )


NOT_ALONE = {"MiniMaxMusic3RVQDepthDecoder", "MotionAdapter", "UVit2DModel", "LegacyModelMixin"}
DENOISING = {"UNetControlNetXSModel"}
"""Among the classes beside the denoisers: a ControlNet and the network that it serves, in one."""


@pytest.mark.parametrize(
    ("of", "denoise"),
    [("transformers", True), ("unets", True), ("controlnets", False), ("autoencoders", False)],
)
def test_every_class_of_diffusers_is_what_it_stands_among(of: str, denoise: bool) -> None:
    for kind in classes(of):
        part = PipelinePart("", kind.__new__(kind), ())
        expected = (denoise and kind.__name__ not in NOT_ALONE) or kind.__name__ in DENOISING
        if kind.__module__.startswith(f"diffusers.models.{of}."):
            assert part.is_denoiser == expected, kind


def test_one_model_in_two_places_is_one_model_afterwards() -> None:
    pipe = graphcache.transform(Outer(), graphcache.presets.fora(6))
    assert pipe.prior_model is pipe.first.transformer
    graphcache.restore(pipe)
    assert type(pipe.prior_model) is type(pipe.first.transformer) is TinyDiT


@pytest.mark.parametrize("named", ["model_b", ["model_b"]])
def test_parts_may_be_named(named: Any) -> None:
    pipe = KINDS["two denoisers"]()
    graphcache.transform(pipe, graphcache.presets.fora(6), parts=named)
    assert type(pipe.model_a) is TinyDiT
    assert pipe.model_b.plan.steps == 6


def test_a_part_of_an_inner_pipeline_goes_by_its_path_or_by_where_else_it_stands() -> None:
    for name in ("second.transformer", "prior_model"):
        pipe = graphcache.transform(Outer(), graphcache.presets.fora(6), parts=name)
        assert at(pipe, name).plan.steps == 6


@pytest.mark.parametrize(
    ("pipe", "parts", "message"),
    [
        (Outer, "prior", r"no module 'prior'.*parts=.*prior_model, encoder, second\.transformer"),
        (tiny, "blocks", r"parts='blocks' names modules of a pipeline, and this is a module"),
        (lambda: Pipeline(model=Encoder()), (), r"none of the modules is called with a time.*parts=.*model"),
    ],
)
def test_what_is_no_part_is_refused_with_what_there_is(pipe: Any, parts: Any, message: str) -> None:
    with pytest.raises(GraphCacheError, match=message):
        graphcache.transform(pipe(), graphcache.presets.fora(6), parts=parts)


class Keeping(Pipeline):
    """Calls the model that it was made with, wherever its attribute points since."""

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self.called = [components["transformer"]]

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.called[0](x, t, text)  # type: ignore[no-any-return]


@pytest.mark.parametrize("ask", [lambda pipe: pipe.transformer.summary(), graphcache.restore])
def test_a_pipeline_that_runs_past_the_model_is_told(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    for kind, told in ((Keeping, True), (Pipeline, False)):
        pipe = graphcache.transform(kind(transformer=tiny()), graphcache.presets.fora(6))
        caplog.clear()
        ask(graphcache.transform(kind(transformer=tiny()), graphcache.presets.fora(6)))
        assert not caplog.text
        pipe(6)
        ask(pipe)
        assert ("no call arrived at the model under the plan" in caplog.text) == told
