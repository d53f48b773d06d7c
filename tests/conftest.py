from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts anew, to be read")


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
