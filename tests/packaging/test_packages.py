"""A package computes what the model under its plan does, in sessions, contexts and pipelines as ever."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, GraphCacheError, Plan, PlanError, presets
from graphcache.compiler import ahead
from graphcache.packaging.archive import Archive
from inside import states_of
from reference import assert_same
from tiny import TinyDiT, arguments, tiny
from tiny_pipeline import Pipeline
from unbuilt import unbuilt

STEPS = 6
PLAN = presets.taylorseer(STEPS, interval=3)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad(), unbuilt():
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of two sizes."""
    made = tmp_path_factory.mktemp("packages") / "tiny.graphcache"
    with torch.no_grad(), unbuilt():
        graphcache.package(tiny(), made, PLAN, [arguments(), arguments(batch=3)])
    return made


def loaded(path: Path) -> Any:
    return graphcache.load(path, trust=True)


def run(model: Any, batch: int = 2, steps: int = STEPS, **changes: Any) -> list[Tensor]:
    made, found = arguments(batch=batch) | changes, []
    for step in range(steps):
        made["timestep"] = torch.full((batch,), 1 - step / steps)
        found.append(model(**made))
        made["x"] = made["x"] - found[-1] / steps
    return found


@pytest.mark.parametrize("batch", [2, 3])
def test_it_computes_what_the_model_does(path: Path, batch: int) -> None:
    ours, theirs = loaded(path), graphcache.transform(tiny(), PLAN)
    torch.testing.assert_close(run(ours, batch), run(theirs, batch), rtol=1e-6, atol=1e-6)
    (one,), (other,) = ours.summary().branches, theirs.summary().branches
    assert one.steps == other.steps
    assert (one.peak_bytes, one.plain_flops, one.phases) == (other.peak_bytes, other.plain_flops, 2)
    assert one.flops <= other.flops, "compiled phases leave out what nobody reads"


def test_sessions_and_threads_have_caches_of_their_own(path: Path) -> None:
    model = loaded(path)
    alone = run(model)
    texts = [torch.full((2, 4), float(i)) for i in range(2)]
    expected = [run(loaded(path), text=text) for text in texts]
    found: list[Any] = [None, None]

    def serve(place: int) -> None:
        with torch.no_grad(), model.session():
            found[place] = run(model, text=texts[place])

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(found, expected)
    assert_same(run(model), alone)


def test_contexts_have_caches_of_their_own(path: Path) -> None:
    model, both = loaded(path), {}
    for name, value in (("cond", 1.0), ("uncond", -1.0)):
        with model.cache_context(name):
            both[name] = model(**arguments() | {"text": torch.full((2, 4), value)})
    assert len(states_of(model)) == 2
    assert not torch.equal(both["cond"], both["uncond"])


def test_it_stands_in_a_pipeline(path: Path) -> None:
    pipe, other = Pipeline(transformer=loaded(path)), Pipeline(transformer=tiny())
    graphcache.transform(other, PLAN)
    assert_same(pipe(STEPS), other(STEPS))
    assert len(pipe.transformer.summary().branches[0].steps) == STEPS  # type: ignore[attr-defined]


def test_a_pipelines_calls_are_recorded(tmp_path: Path) -> None:
    class Called(Pipeline):
        def __call__(self, num_inference_steps: int) -> Tensor:  # type: ignore[override]
            return super().__call__(num_inference_steps)

    for pipe in (Called(transformer=tiny()), graphcache.transform(Called(transformer=tiny()), PLAN)):
        graphcache.package(pipe, tmp_path / "made", PLAN, [{}])
        assert_same(Pipeline(transformer=loaded(tmp_path / "made"))(STEPS), pipe_result())
    with pytest.raises(GraphCacheError, match=r"pipeline failed for \{'height': 3\}.*keyword arguments"):
        graphcache.package(Called(transformer=tiny()), tmp_path / "no", PLAN, [{"height": 3}])
    assert not (tmp_path / "no").exists()


def pipe_result() -> Tensor:
    pipe = Pipeline(transformer=tiny())
    graphcache.transform(pipe, PLAN)
    return pipe(STEPS)


class Doubled(nn.Module):
    """Guidance on a doubled batch, with a result, a config and attributes as diffusers' models have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny(2)
        self.config = {"in_channels": 4, "sizes": (2, 3), "made": object}
        self.scale, self.names = 2.0, ["a"]
        self.register_buffer("table", torch.arange(12.0).view(3, 4).t(), persistent=False)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, extra: Any = None) -> Any:
        made = self.inner(x, timestep, text) + self.table.sum() * 0
        return {"sample": made, "more": (made * self.scale, extra)}


GUIDED = Plan.parse("plan steps=6 preset=none conditional=last\nguidance  #.#.#.\n@mlp  ##.#.#\n")


def guided(model: Any) -> list[Any]:
    x, found = arguments()["x"], []
    for step in range(STEPS):
        made = arguments(batch=4) | {"x": torch.cat([x, x]), "timestep": torch.full((4,), 1 - step / STEPS)}
        found.append(model(**made, extra={"kept": 1.5}))
        x = x - found[-1]["sample"].chunk(2)[1] / STEPS
    return found


def test_doubled_batches_results_and_attributes(tmp_path: Path) -> None:
    x = arguments()["x"]
    call = arguments(batch=4) | {"x": torch.cat([x, x]), "extra": {"kept": 1.5}}
    graphcache.package(Doubled().eval(), tmp_path / "made", GUIDED, [call])
    model = loaded(tmp_path / "made")
    expected = guided(graphcache.transform(Doubled().eval(), GUIDED))
    torch.testing.assert_close(guided(model), expected, rtol=1e-5, atol=1e-5)
    assert (model.config.in_channels, model.config["sizes"]) == (4, (2, 3))
    assert (model.scale, model.dtype, model.device.type) == (2.0, torch.float32, "cpu")
    assert model.table.stride() == Doubled().table.stride()  # type: ignore[operator]
    assert model.state_dict().keys() == Doubled().state_dict().keys()
    with pytest.raises(AttributeError, match="config has no 'made'"):
        _ = model.config.made
    assert not hasattr(model, "names")


def test_guidance_by_two_calls_a_step(tmp_path: Path) -> None:
    plan = Plan.parse("plan steps=6 preset=none\nguidance  #.#.#.\n")
    graphcache.package(tiny(), tmp_path / "made", plan, [arguments()])
    ours, theirs = loaded(tmp_path / "made"), graphcache.transform(tiny(), plan)
    found: list[list[Tensor]] = []
    for model in (ours, theirs):
        found.append([])
        for step in range(STEPS):
            for name, value in (("cond", 1.0), ("uncond", -1.0)):
                made = arguments(1 - step / STEPS) | {"text": torch.full((2, 4), value)}
                with model.cache_context(name):
                    found[-1].append(model(**made))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert len(ours.summary().branches) == 2


def test_budgets_of_tokens(tmp_path: Path) -> None:
    plan = presets.toca(STEPS, ratio=0.5, multiple=1)
    graphcache.package(tiny(2), tmp_path / "made", plan, [arguments(tokens=8)])
    ours, theirs = loaded(tmp_path / "made"), graphcache.transform(tiny(2), plan)
    found = [run(model, x=arguments(tokens=8)["x"]) for model in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert ours.summary().branches[0].steps == theirs.summary().branches[0].steps
    assert any(step.partial for step in ours.summary().branches[0].steps)


def test_times_that_are_numbers(tmp_path: Path) -> None:
    class ByNumber(TinyDiT):
        def forward(self, x: Tensor, timestep: Any, text: Tensor) -> Tensor:
            return super().forward(x, torch.ones(2) * timestep, text)

    def generate(model: Any) -> list[Tensor]:
        return [model(**arguments() | {"timestep": 1 - step / STEPS}) for step in range(STEPS)]

    graphcache.package(tiny(kind=ByNumber), tmp_path / "made", PLAN, [arguments() | {"timestep": 1.0}])
    expected = generate(graphcache.transform(tiny(kind=ByNumber), PLAN))
    torch.testing.assert_close(generate(loaded(tmp_path / "made")), expected, rtol=1e-6, atol=1e-6)


def test_an_input_that_changes_is_hoisted_anew(path: Path) -> None:
    ours, theirs = loaded(path), graphcache.transform(tiny(), PLAN)
    for step in range(STEPS):
        made = arguments(1 - step / STEPS) | {"text": torch.full((2, 4), float(step))}
        torch.testing.assert_close(ours(**made), theirs(**made), rtol=1e-6, atol=1e-6)


def test_weights_are_swapped(path: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, before = loaded(path), run(loaded(path))
    other = TinyDiT()
    expected = run(graphcache.transform(other.eval(), PLAN))
    model.load_weights(other.state_dict())
    torch.testing.assert_close(run(model), expected, rtol=1e-6, atol=1e-6)
    save_file(tiny().state_dict(), tmp_path / "first.safetensors")
    model.load_weights(tmp_path / "first.safetensors")
    assert_same(run(model), before)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(run(model), expected, rtol=1e-6, atol=1e-6)
    assert_same(run(loaded(path)), before), "the file is as it was"


def test_weights_that_do_not_fit_change_nothing(path: Path, tmp_path: Path) -> None:
    model, state = loaded(path), tiny().state_dict()
    before, name = run(model), "blocks.0.up.weight"
    wrong = [
        ({key: value * 2 for key, value in state.items() if key != name}, f"lacks {name}"),
        (state | {"more": state[name]}, "has, and the package does not, more"),
        (state | {name: state[name].double()}, f"{name} is torch.float64 of shape"),
        (state | {name: state[name].t()}, rf"{name} is torch.float32 of shape \(4, 8\)"),
    ]
    for values, message in wrong:
        with pytest.raises(GraphCacheError, match=message):
            model.load_weights(values)
    (tmp_path / "none").write_bytes(b"no")
    with pytest.raises(GraphCacheError, match="cannot be read as safetensors"):
        model.load_weights(tmp_path / "none")
    assert_same(run(model), before)
    model.get_submodule("blocks.0.up").weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(
        CaptureError, match=r"weight blocks\.0\.up\.weight .* replaced by one of another shape"
    ):
        run(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 5, 4)}, r"x float32\(2, 5, 4\), where it has x float32\(2, 3, 4\)"),
        ({"x": torch.ones(2, 3, 4).double()}, r"x float64\(2, 3, 4\).*among sizes="),
        ({"text": torch.ones(1, 4)}, r"text float32\(1, 4\)"),
        ({"timestep": 1.0}, r"no code for this call: timestep float64\(\)"),
    ],
)
def test_other_calls_are_refused(path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        loaded(path)(**arguments() | changes)


def test_what_only_a_model_can_do_is_refused(path: Path) -> None:
    import copy
    import pickle

    model = loaded(path)
    with model.disabled(), pytest.raises(CaptureError, match="load the model itself"):
        model(**arguments())
    with torch.enable_grad(), pytest.raises(CaptureError, match="no gradients"):
        model(**arguments() | {"x": torch.randn(2, 3, 4, requires_grad=True)})
    with torch.autocast("cpu"), pytest.raises(CaptureError, match="autocast"):
        model(**arguments())
    for use in (copy.deepcopy, pickle.dumps):
        with pytest.raises(GraphCacheError, match="load the package"):
            use(model)
    with pytest.raises(GraphCacheError, match="compiled already"):
        model.compile()
    assert model.to("cpu", torch.float32) is model
    for convert in (model.half, lambda: model.to("meta")):
        with pytest.raises(GraphCacheError, match=r"compiled for torch\.float32 on cpu, and is asked for"):
            convert()
    with pytest.raises(CaptureError, match="training mode"):
        model.train()(**arguments())
    model.eval()
    model.reset(steps=1)
    with pytest.raises(PlanError, match=r"another number of steps.*steps="):
        run(model, steps=1)
    assert graphcache.restore(model) is model


def test_modules_put_in_and_hooks_are_refused(path: Path) -> None:
    model = loaded(path)
    handle = model.get_submodule("blocks.0").register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"blocks\.0 has forward hooks"):
        model(**arguments())
    handle.remove()
    model.get_submodule("blocks.0").up = nn.Linear(4, 8, bias=False)
    with pytest.raises(CaptureError, match=r"modules .* put in or taken out.*load_weights"):
        model(**arguments())


def test_another_number_of_steps(tmp_path: Path) -> None:
    plan = presets.taylorseer(4, interval=2)
    graphcache.package(tiny(), tmp_path / "made", plan, [arguments()], steps=[7])
    ours, theirs = loaded(tmp_path / "made"), graphcache.transform(tiny(), plan)
    for model in (ours, theirs):
        model.reset(steps=7)
    torch.testing.assert_close(run(ours, steps=7), run(theirs, steps=7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("depth", "regions", "flops"),
    [(6, True, 2**26), (6, False, 0), (60, "auto", 1), (60, "auto", 2**26), (2, "auto", 1)],
)
def test_regions_are_code_that_is_there_once(
    tmp_path: Path, depth: int, regions: Any, flops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "PART", flops)
    graphcache.package(tiny(depth), tmp_path / "made", PLAN, [arguments()], regions=regions)
    ours, theirs = loaded(tmp_path / "made"), graphcache.transform(tiny(depth), PLAN)
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-5, atol=1e-5)
    held = Archive(tmp_path / "made").manifest
    parts = [[part.code for part in graph.parts] for graph in held.needed]
    assert {number for numbers in parts for number in numbers} == {*range(len(held.codes))}
    if regions is False or depth == 2 or (regions == "auto" and flops > 1):
        assert [*map(len, parts)] == [1, 1, 1]
    else:
        assert sum(map(len, parts)) > 2 * depth
        assert len(held.codes) < 9, "whatever the depth"
        assert {*parts[1]} & {*parts[2]}, "what phases have in common is there once"


class Turned(TinyDiT):
    """Its first block is given the stream in other strides than the rest."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward((x.transpose(1, 2).contiguous() * 2).transpose(1, 2), timestep, text)


def test_every_region_is_given_the_strides_that_it_is_for(tmp_path: Path) -> None:
    graphcache.package(tiny(5, Turned), tmp_path / "made", PLAN, [arguments()], regions=True)
    expected = run(graphcache.transform(tiny(5, Turned), PLAN))
    torch.testing.assert_close(run(loaded(tmp_path / "made")), expected, rtol=1e-5, atol=1e-5)
    codes = Archive(tmp_path / "made").manifest.codes
    assert any(line.stride == [12, 1, 3] for code in codes for line in code.inputs)


def test_regions_of_a_transformed_model_are_those_that_it_has(tmp_path: Path) -> None:
    with pytest.raises(GraphCacheError, match="regions='all': must be True, False or 'auto'"):
        graphcache.package(tiny(), tmp_path / "made", PLAN, [arguments()], regions="all")  # type: ignore[arg-type]
    asked = graphcache.transform(tiny(4), PLAN, regions=True)
    graphcache.package(asked, tmp_path / "made", sizes=[arguments()])
    assert any(len(graph.parts) > 1 for graph in Archive(tmp_path / "made").manifest.needed)


def test_budgets_of_tokens_by_regions(tmp_path: Path) -> None:
    plan = presets.toca(STEPS, ratio=0.5, multiple=1)
    graphcache.package(tiny(5), tmp_path / "made", plan, [arguments(tokens=8)], regions=True)
    ours, theirs = loaded(tmp_path / "made"), graphcache.transform(tiny(5), plan)
    found = [run(model, x=arguments(tokens=8)["x"]) for model in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert any(len(graph.parts) > 1 for graph in Archive(tmp_path / "made").manifest.needed)
