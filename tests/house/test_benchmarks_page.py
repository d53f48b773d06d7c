"""docs/benchmarks.md is what the records say, and so are the figures that other pages quote of them."""

import re
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from examples.benchmarks_page import PAGE, page, records, slug
from examples.records import ROOT, Column, Destination, Machine, Record, load, report
from examples.sweep import at_equal_time

RECORDS = records()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIRST_BY_SCRIPTS = "2026-11-29"
"""Before this day figures were written down by hand, and not everything was noted."""


def passages(text: str) -> Iterator[str]:
    """Paragraphs, and rows of tables one by one, links by reference spelt out."""
    for name, target in re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE):
        text = text.replace(f"[{name}]: {target}", "").replace(f"[{name}]", f"[{name}]({target})")
    for paragraph in re.split(r"\n\s*\n", text):
        yield from paragraph.splitlines() if paragraph.startswith("|") else [paragraph]


def figures(text: str) -> list[str]:
    """Decimals outside of code; whole numbers are mostly settings."""
    return re.findall(r"(?<![\w.])\d+\.\d+(?![.\w])", re.sub(r"`[^`]*`", "", text))


def unfounded(text: str, named: Iterable[Record]) -> list[str]:
    """Figures of a text that no cell of the records rounds to."""
    rows = [cell for record in named for row in record.rows for cell in row]
    values = [value for cell in rows for value in (cell if isinstance(cell, list) else [cell])]
    numbers = [value for value in values if isinstance(value, int | float)]

    def stands(figure: str) -> bool:
        digits = len(figure.partition(".")[2])
        return any(f"{number:.{digits}f}" == figure for number in numbers)

    return [figure for figure in figures(text) if not stands(figure)]


def quoted(passage: str) -> list[str]:
    return re.findall(r"benchmarks\.md#([\w-]+)", passage)


def test_the_page_is_what_make_benchmarks_page_writes() -> None:
    assert page(RECORDS) == PAGE.read_text(), "docs/benchmarks.md is not what `make benchmarks-page` writes"


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_says_where_it_comes_from(name: str) -> None:
    record = RECORDS[name]
    assert slug(record.title) == name
    assert f"### {record.title}\n" in PAGE.read_text(), "examples/benchmarks_page.py leaves it out"
    assert record.question
    assert re.fullmatch(r"[0-9a-f]{7,40}", record.commit), "made by code that no commit has"
    assert all(date.fromisoformat(day) for day in record.date.split("/"))
    assert record.versions.keys() >= {"python", "torch", "diffusers"}
    assert record.rows
    assert {len(row) for row in record.rows} == {len(record.columns)}
    if record.date >= FIRST_BY_SCRIPTS:
        noted = [record.command, *msgspec.to_builtins(record.machine).values(), *record.versions.values()]
        assert None not in noted


@pytest.mark.parametrize("name", RECORDS)
def test_what_a_record_answers_stands_in_its_rows(name: str) -> None:
    assert not unfounded(RECORDS[name].answer, [RECORDS[name]])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_figures_beside_a_link_to_a_record_stand_in_it(path: Path) -> None:
    for passage in passages(path.read_text()):
        if names := quoted(passage):
            assert not unfounded(passage, [RECORDS[name] for name in names]), passage


def test_every_figure_of_what_it_gains_names_its_record() -> None:
    text = (ROOT / "README.md").read_text()
    gains = list(passages(text.partition("## What it gains")[2].partition("\n## ")[0]))
    assert max(map(len, text.splitlines())) <= 100
    assert sum(map(bool, map(quoted, gains))) >= 4
    assert not [passage for passage in gains if figures(passage) and not quoted(passage)]


def test_another_figure_is_noticed() -> None:
    machine = Machine(None, None, None, None, None)
    columns, rows = [Column("method"), Column("PSNR", "dB", 1)], [["a", [53.04, 2.4]], ["b", 40.0]]
    record = Record("t", "q", "", None, "c", "d", machine, {}, columns, rows)
    assert not unfounded("53.0 ± 2.4 dB, `x=0.7`, 40.0 and 17 steps", [record])
    assert unfounded("53.1 dB, 2.4, 40.01, 4.0", [record]) == ["53.1", "40.01", "4.0"]


def test_another_run_keeps_the_words_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = RECORDS["found-plans-on-digits"]
    to = Destination(tmp_path / "record.json", "1234567", old)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--seeds", "3", "--json", str(to.path)])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="examples.benchmark"))
    report("other", [Column("method"), Column("PSNR", "dB", 1)], [["a", [1.23456789, 0.5]], ["b", None]], to)
    new = load(to.path)
    assert (new.title, new.question, new.answer) == (old.title, old.question, old.answer)
    assert new.rows == [["a", [1.2346, 0.5]], ["b", None]]
    assert new.command is not None
    assert new.command.endswith("python -m examples.benchmark --seeds 3")
    assert (new.commit, new.date) == ("1234567", datetime.now(UTC).date().isoformat())
    assert None not in [*msgspec.to_builtins(new.machine).values(), *new.versions.values()]


def test_a_rival_is_its_best_setting_that_is_as_fast() -> None:
    quality = {
        "tuned 1.5": [60.0, 62.0],
        "tuned 3.0": [50.0],
        "fora 2": [40.0],
        "fora 3": [41.0],
        "fora 4": [30.0],
    }
    quality |= {"34 steps DDIM": [45.0], "18 steps DDIM": [35.0], "pab": [70.0]}
    speed = {"tuned 1.5": 1.5, "tuned 3.0": 3.0, "fora 2": 1.48, "fora 3": 1.4, "fora 4": 3.2}
    columns, rows = at_equal_time(quality, speed, (1.5, 3.0), steps=50)
    assert [column.name for column in columns] == [
        "asked",
        "measured",
        "tuned",
        "fora",
        "fewer steps, DDIM",
        "pab",
    ]
    assert rows == [
        [1.5, 1.5, [61.0, 1.0], [40.0, 0.0], [45.0, 0.0], None],
        [3.0, 3.0, [50.0, 0.0], [30.0, 0.0], None, None],
    ]
