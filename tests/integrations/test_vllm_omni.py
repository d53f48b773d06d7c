"""The backend for vLLM-Omni, over a stand-in of its base class and of a pipeline that is a module."""

import abc
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import graphcache
from graphcache import GraphCacheError, Plan
from graphcache.integrations import vllm_omni
from tiny import tiny

STEPS = 6
TEXT = "plan steps=6 preset=none\nt = taylorseer order=1\n@self #.#t.#\n@mlp #.##.."


class CacheBackend(abc.ABC):
    """What vLLM-Omni's base class has."""

    def __init__(self, config: Any) -> None:
        self.config, self.enabled = config, False

    @abc.abstractmethod
    def enable(self, pipeline: Any) -> None: ...

    @abc.abstractmethod
    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None: ...

    def is_enabled(self) -> bool:
        return self.enabled


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ModuleType("base")
    base.CacheBackend = CacheBackend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, vllm_omni._BASE, base)
    for name in ("vllm_omni", "vllm_omni.diffusion", "vllm_omni.diffusion.cache"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


class Pipeline(nn.Module):
    """Two denoisers that take turns over the steps, guidance in two calls, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = tiny(1), tiny(2)
        self.decoder = nn.Linear(4, 4)
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def forward(self, steps: int = STEPS, seed: int = 0) -> Tensor:
        made = torch.Generator().manual_seed(seed)
        x, one, other = (torch.randn(shape, generator=made) for shape in ((1, 3, 4), (1, 4), (1, 4)))
        self.scheduler.set_timesteps(steps)
        for time in self.scheduler.timesteps:
            model = self.transformer if time > 500 else self.transformer_2
            t = (time / 1000).expand(1)
            cond, uncond = (model(x=x, timestep=t, text=text) for text in (one, other))
            x = self.scheduler.step(uncond + 2 * (cond - uncond), time, x, return_dict=False)[0]
        return x


class Outer:
    """The same as a plain object, which `transform` takes."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.transformer, self.transformer_2 = pipeline.transformer, pipeline.transformer_2
        self.scheduler = pipeline.scheduler

    def __call__(self, *args: Any) -> Tensor:
        return Pipeline.forward(self, *args)  # type: ignore[arg-type]


def expected(steps: int = STEPS, seed: int = 0) -> Tensor:
    return graphcache.transform(Outer(Pipeline()), Plan.parse(TEXT))(steps, seed)


def run(backend: Any, pipeline: Pipeline, steps: int = STEPS, seed: int = 0) -> Tensor:
    backend.refresh(pipeline, steps)
    return pipeline(steps, seed)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("installed")
def test_requests_are_those_of_the_transformed_pipeline() -> None:
    pipeline, backend = Pipeline(), vllm_omni.backend({"plan": TEXT})
    assert isinstance(backend, CacheBackend)
    assert not backend.is_enabled()
    before = pipeline(STEPS)
    backend.enable(pipeline)
    assert backend.is_enabled()
    for steps, seed in ((STEPS, 0), (STEPS, 1), (9, 0)):
        assert torch.equal(run(backend, pipeline, steps, seed), expected(steps, seed))
    assert not torch.equal(run(backend, pipeline), before)
    backend.disable(pipeline)
    assert not backend.is_enabled()
    assert torch.equal(pipeline(STEPS), before)


@pytest.mark.usefixtures("installed")
def test_computing_everything_gives_the_untouched_result() -> None:
    pipeline, backend = Pipeline(), vllm_omni.backend({"plan": "compute:6"})
    before = pipeline(STEPS)
    backend.enable(pipeline)
    assert torch.equal(run(backend, pipeline), before)


@pytest.mark.usefixtures("installed")
def test_a_request_that_failed_is_forgotten() -> None:
    pipeline, backend = Pipeline(), vllm_omni.backend(SimpleNamespace(plan=TEXT))
    backend.enable(pipeline)

    class Cancelled(Exception):
        pass

    def cancel(*args: Any, **kwargs: Any) -> None:
        raise Cancelled

    step = pipeline.scheduler.step
    pipeline.scheduler.step = cancel
    with pytest.raises(Cancelled):
        run(backend, pipeline)
    pipeline.scheduler.step = step
    assert torch.equal(run(backend, pipeline), expected())


@pytest.mark.usefixtures("installed")
def test_parts_are_named_or_found() -> None:
    pipeline = Pipeline()
    before = pipeline.transformer_2
    backend = vllm_omni.backend({"plan": TEXT, "parts": "transformer"})
    backend.enable(pipeline)
    assert pipeline.transformer_2 is before
    assert hasattr(pipeline.transformer, "summary")
    pipeline.transformer = tiny(1)
    with pytest.raises(GraphCacheError, match="transformer was exchanged"):
        backend.refresh(pipeline, STEPS)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("config", "message"),
    [({}, "no plan"), ({"plan": "fora"}, "how many steps"), ({"plan": "no.txt"}, "no.txt")],
)
def test_a_config_without_a_plan_is_refused(config: dict[str, Any], message: str) -> None:
    pipeline, backend = Pipeline(), vllm_omni.backend(config)
    with pytest.raises(GraphCacheError, match=message):
        backend.enable(pipeline)
    assert not backend.is_enabled()


def test_without_vllm_omni_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_omni", None)
    with pytest.raises(GraphCacheError, match="pip install vllm-omni"):
        vllm_omni.backend({"plan": TEXT})
