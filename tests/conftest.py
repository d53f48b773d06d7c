import gc
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from graphcache.compiler.captured import Captured
from graphcache.compiler.compilations import EVERYONES, EVERYONES_FAMILIES
from graphcache.compiler.modes import ambient, around_code
from graphcache.libraries.diffusers_private import attention_backend
from graphcache.tracing.symbolic import Symbolic
from seeding import Run, numbers_of
from sharing import Sharing

# what earlier runs found, and how fast the machine is, decides nothing
settings.register_profile(
    "reproducible",
    database=None,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("reproducible")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts anew, to be read")
    parser.addoption("--every-model", action="store_true", help="all cases of tests that are marked few")
    parser.addoption("--own-captures", action="store_true", help="capture alike models each for itself")
    parser.addoption(
        "--seed", type=int, default=Run.seed, help="of all random numbers; else the variable SEED, else 0"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    Run.seed = config.getoption("--seed")
    Run.every = config.getoption("--every-model")
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(Run.seed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.keys() & {"failed", "error"}:
        terminalreporter.write_line(f"These are the random numbers of --seed {Run.seed}.")


@pytest.fixture(autouse=True)
def _own_numbers(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test has the same random numbers whatever ran before it, in whatever process."""
    with numbers_of(request.node.nodeid):
        yield


@pytest.fixture(autouse=True)
def _same_modes() -> Iterator[None]:
    """What PyTorch would do for anyone else in the process is as it was: autocast, attention's kernels and
    their order, gradients.
    """
    before, backend = ambient(), attention_backend()
    yield
    # diffusers has no backend of attention before it is imported
    assert ambient() == before or (backend is None and around_code() == before[: len(around_code())])


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """So has a fixture that several tests share."""
    if fixturedef.scope == "function":
        return (yield)
    with numbers_of(f"{fixturedef.baseid} {fixturedef.argname} {getattr(request, 'param', '')}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Numbers drawn while files are read would hang on which files are read before."""
    before = torch.get_rng_state(), np.random.get_state()[1]
    result = yield
    after = torch.get_rng_state(), np.random.get_state()[1]
    if not all(np.array_equal(one, other) for one, other in zip(before, after, strict=True)):
        raise pytest.UsageError("a file of tests draws random numbers when it is read")
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """The longest tests begin first, so that no process is left alone with one in the end."""
    if not config.getoption("--every-model"):
        left_out = {*_left_out(items)}
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.path.parent.name != "whole")


def _left_out(items: list[pytest.Function]) -> Iterator[pytest.Function]:
    """Of the cases of a test marked `few(n)` all but n, which the seed chooses: the same of the same ones."""
    tests = defaultdict[Any, list[pytest.Function]](list)
    for item in items:
        if item.get_closest_marker("few"):
            tests[item.path, item.cls, item.originalname].append(item)
    for (path, *_), cases in tests.items():
        (most,) = cases[0].get_closest_marker("few").args  # type: ignore[union-attr]
        cases.sort(key=lambda item: item.callspec.id)
        chosen = random.Random(f"{Run.seed} {path.stem}").sample(cases, min(most, len(cases)))
        yield from (item for item in cases if item not in chosen)


def pytest_collection_finish() -> None:
    """Tracing makes garbage by the million; looking through PyTorch for it took a twentieth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def own_garbage() -> None:
    """What is collected, or looked for among all objects, is the test's own and not what others left."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_code() -> None:
    """What one test has compiled serves no other: compilations are counted."""
    EVERYONES.clear()
    EVERYONES_FAMILIES.clear()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compares a text with the file named after the test; --update-golden writes the file instead."""
    name = request.node.name.removeprefix("test_").replace("[", "_").replace("]", "")
    path = request.path.parent / "golden" / request.path.stem / f"{name}.txt"

    def check(text: str, most: int = 45) -> None:
        assert len(text.splitlines()) <= most
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        assert path.read_text() == f"{text}\n"

    return check


@pytest.fixture
def sharing(shared_captures: Sharing, monkeypatch: pytest.MonkeyPatch) -> Sharing:
    """For tests of sharing itself."""
    monkeypatch.setattr(Captured, "of", shared_captures)
    monkeypatch.setattr(Symbolic, "of", shared_captures.symbolic)
    return shared_captures


@pytest.fixture
def captured_anew(shared_captures: Sharing, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of capturing itself."""
    monkeypatch.setattr(Captured, "of", shared_captures.capture)
    monkeypatch.setattr(Symbolic, "of", shared_captures.trace)


@pytest.fixture(autouse=True, scope="session")
def shared_captures(request: pytest.FixtureRequest) -> Iterator[Sharing]:
    """A capture is made once for all models that are alike."""
    sharing = Sharing(Captured.of, Symbolic.of)
    if request.config.option.own_captures:
        yield sharing
        return
    with patch.object(Captured, "of", sharing), patch.object(Symbolic, "of", sharing.symbolic):
        yield sharing
