"""The class of a transformed model passes for the model's own wherever classes are compared."""

import abc
import copy
import functools
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import graphcache
from graphcache import Plan, presets
from reference import assert_same
from tiny import TinyDiT, arguments, tiny
from zoo import CASES


class Registering(type):
    """A metaclass with a record of its own."""

    made: list[str]

    def __init__(cls, name: str, bases: Any, names: Any) -> None:
        super().__init__(name, bases, names)
        cls.made = [*getattr(cls, "made", []), name]


class Recorded(TinyDiT, metaclass=Registering):
    pass


class Abstract(TinyDiT, abc.ABC):
    @abc.abstractmethod
    def described(self) -> str: ...


class Concrete(Abstract):
    def described(self) -> str:
        return "concrete"


class Other(TinyDiT):
    pass


KINDS = [TinyDiT, Recorded, Concrete]


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def transformed(kind: Any = TinyDiT) -> Any:
    return graphcache.transform(tiny(kind=kind), presets.compute(1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_found_where_the_models_own_is(kind: Any) -> None:
    made = type(transformed(kind))
    assert made is not kind
    assert made == kind
    assert kind == made
    assert hash(made) == hash(kind)
    assert made in [kind]
    assert made in {kind: 1}
    assert kind in {made}
    again = graphcache.transform(transformed(kind), presets.compute(2))
    assert {type(model) for model in (transformed(kind), again, copy.deepcopy(again))} == {made}


@pytest.mark.parametrize("other", [Other, nn.Module, object, TinyDiT, "TinyDiT", None])
def test_it_equals_nothing_else(other: Any) -> None:
    made = type(transformed(Concrete))
    assert made != other
    assert other != made
    assert made not in (other, type(transformed(Other)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_a_metaclass_runs_as_before(kind: Any) -> None:
    model = tiny(kind=kind)
    cached = graphcache.transform(model, presets.compute(1))
    assert_same(cached(**arguments()), model(**arguments()))
    assert isinstance(type(cached), type(kind))
    assert issubclass(type(cached), kind)


def test_generic_functions_find_the_models_implementation() -> None:
    @functools.singledispatch
    def name(_: Any) -> str:
        return "anything"

    cached = transformed(Other)
    name.register(nn.Module, lambda _: "module")
    assert (name(cached), name(tiny(kind=Other))) == ("module", "module")
    name.register(Other, lambda _: "other")
    for _ in range(2):
        assert (name(cached), name(tiny(kind=Other)), name(tiny())) == ("other", "other", "module")


def test_abstract_classes_know_it() -> None:
    class Known(abc.ABC):
        @abc.abstractmethod
        def described(self) -> str: ...

    cached, plain = transformed(Other), tiny(kind=Other)
    assert not isinstance(cached, Known)
    assert not isinstance(plain, Known)
    Known.register(Other)
    assert isinstance(cached, Known)
    assert isinstance(plain, Known)
    assert not isinstance(tiny(), Known)
    assert isinstance(cached, Other)
    assert not isinstance(tiny(), type(cached))


def test_compiled_code_tells_the_model_from_the_transformed_one() -> None:
    torch._dynamo.reset()
    model, plan = tiny(2), Plan.parse("plan steps=2 preset=none\n* #.")
    cached, alone = (graphcache.transform(model, plan) for _ in range(2))
    doubled = torch.compile(lambda model, kwargs: model(**kwargs) * 2, backend="eager")
    for time in (1.0, 0.5, 1.0, 0.5):
        kwargs = {**arguments(), "timestep": torch.full((2,), time)}
        torch.testing.assert_close(doubled(model, kwargs), model(**kwargs) * 2)
        expected = alone(**kwargs)
        torch.testing.assert_close(doubled(cached, kwargs), expected * 2)
        assert torch.equal(expected, model(**kwargs)) == (time == 1.0)
    torch._dynamo.reset()


def test_a_configured_model_is_made_by_the_class() -> None:
    cached = graphcache.transform(CASES["dit"].make(), presets.compute(1))
    kind = type(cached)
    assert kind in (diffusers.DiTTransformer2DModel, diffusers.FluxTransformer2DModel)
    assert type(kind.from_config(cached.config)) is diffusers.DiTTransformer2DModel
