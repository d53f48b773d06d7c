"""docs/models.md says what the data of the tests say; `make models` writes it anew."""

from models_page import PAGE, page, taken_in
from zoo.expected import EXPECTED


def test_the_page_is_what_make_models_writes() -> None:
    text = PAGE.read_text()
    taken = taken_in(text)
    assert taken.keys() == EXPECTED.keys(), (
        "docs/models.md lists other classes than tests/kit/zoo: `make models`"
    )
    assert page(taken) == text, "docs/models.md is not what `make models` writes"
