import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from graphcache.program import Captured
from sharing import Sharing

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts anew, to be read")


def pytest_collection_finish() -> None:
    """Tracing makes garbage by the million; looking through PyTorch for it took a twentieth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compares a text with the file named after the test; --update-golden writes the file instead."""
    name = request.node.name.removeprefix("test_").replace("[", "_").replace("]", "")
    path = GOLDEN / f"{name}.txt"

    def check(text: str) -> None:
        assert len(text.splitlines()) <= 45
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{text}\n")
        assert path.read_text() == f"{text}\n"

    return check


@pytest.fixture
def captured_anew(shared_captures: Sharing, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of capturing itself."""
    monkeypatch.setattr(Captured, "of", shared_captures.capture)


@pytest.fixture(autouse=True, scope="session")
def shared_captures() -> Iterator[Sharing]:
    """A capture is made once for all models that are alike."""
    sharing = Sharing(Captured.of)
    with patch.object(Captured, "of", sharing):
        yield sharing
