"""Every transformer class of the installed diffusers, tiny, under plans, beside hooks on the untouched one.

A run tests some of them, which the seed chooses; `make test-models` tests all.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, presets
from inside import engine_of
from reference import assert_same
from zoo.classes import KINDS
from zoo.expected import EXPECTED, REFUSED
from zoo.kind import installed

STEPS, ACTIONS = 4, "#.#."


def known(test: Any) -> Any:
    """A test of three classes in each run; those of one class stand together, where they share a capture."""
    return pytest.mark.few(3)(pytest.mark.parametrize("known", sorted(EXPECTED), scope="module")(test))


def refused(test: Any) -> Any:
    """A test of one refused class in each run."""
    return pytest.mark.few(1)(pytest.mark.parametrize("refused", sorted(REFUSED), scope="module")(test))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.lru_cache(maxsize=1)
def model(name: str) -> nn.Module:
    return KINDS[name].make()


def tensors(output: Any) -> list[Tensor]:
    """All that a model returns, in a list."""
    found = [item for item in torch.utils._pytree.tree_leaves(plain(output)) if isinstance(item, Tensor)]
    assert found, "the model returns no tensor"
    return found


def plain(output: Any) -> Any:
    return output.to_tuple() if hasattr(output, "to_tuple") else output


def results(of: Any, name: str) -> list[list[Tensor]]:
    return [tensors(of(**call)) for call in KINDS[name].generation(STEPS)]


def under(name: str, plan: graphcache.Plan) -> Any:
    return graphcache.transform(model(name), plan, **KINDS[name].says)


class Held:
    """Lets matching modules return what they returned at the latest step of `#`, call by call."""

    def __init__(self, name: str) -> None:
        self.step = -1
        self.name = name
        self.calls: Counter[nn.Module] = Counter()
        self.stored: dict[tuple[nn.Module, int], Any] = {}

    def __call__(self, **call: Any) -> Any:
        self.step += 1
        self.calls.clear()
        with self._hooked():
            return model(self.name)(**call)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        pattern = EXPECTED[self.name].modules
        matching = [item for path, item in model(self.name).named_modules() if re.fullmatch(pattern, path)]
        hooks = [item.register_forward_hook(self._replace) for item in matching]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _replace(self, module: nn.Module, args: Any, output: Any) -> Any:
        key = module, self.calls[module]
        self.calls[module] += 1
        if ACTIONS[self.step] == "#":
            self.stored[key] = output
        return self.stored[key]


def test_every_class_has_a_configuration() -> None:
    missing = sorted(installed().keys() - KINDS.keys())
    assert not missing, (
        f"diffusers has {', '.join(missing)}: add a tiny configuration and the arguments of a call to "
        "tests/kit/zoo/classes, and what is expected to tests/kit/zoo/expected.py; then `make models`"
    )
    assert KINDS.keys() == installed().keys()
    assert KINDS.keys() == EXPECTED.keys() | REFUSED.keys()
    assert not EXPECTED.keys() & REFUSED.keys()


@known
def test_a_plan_that_only_computes_changes_no_bit(known: str) -> None:
    assert_same(results(under(known, presets.compute(STEPS)), known), results(model(known), known))


@known
def test_branches_are_those_of_the_source(known: str) -> None:
    step = engine_of(under(known, presets.compute(1))).prepare(KINDS[known].generation(1)[0]).step
    found = Counter(branch.role + ".context" * branch.context for branch in step.branches)
    assert found == EXPECTED[known].roles


@known
def test_fora_holds_what_hooks_on_the_untouched_model_hold(known: str) -> None:
    result = results(under(known, presets.fora(STEPS, interval=2)), known)
    assert_same(result, results(Held(known), known))
    for step, action in enumerate(ACTIONS):
        same = all(map(torch.equal, result[step], results(model(known), known)[step]))
        assert same == (action == "#")


@refused
def test_what_cannot_be_captured_is_refused_with_its_reason(refused: str) -> None:
    torch._dynamo.reset()  # what attention compiled for one class can break that of the next
    results(model(refused), refused)
    with pytest.raises(CaptureError, match=REFUSED[refused].message):
        results(under(refused, presets.compute(STEPS)), refused)
