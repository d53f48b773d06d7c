"""Each room imports only what stands before it, and every module is in a room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (
    "graphcache.libraries",
    "graphcache.ir",
    "graphcache.analysis",
    "graphcache.passes",
    "graphcache.tracing",
    "graphcache.presets",
    "graphcache.compiler",
    "graphcache.runtime",
    "graphcache.packaging",
    "graphcache.integrations",
    "graphcache.cost",
    "graphcache.planning",
    "graphcache.page",
    "graphcache.cli",
    "examples",
)


def folder(room: str) -> Path:
    name = room.removeprefix("graphcache.")
    return ROOT / name if name in ("analysis", "passes", "examples") else ROOT / "graphcache" / name


def place(module: str) -> int | None:
    """The room of a module; None of modules from elsewhere. Errors import nothing, and are everyone's."""
    if module.startswith("graphcache.ir.errors."):
        return 0
    found = (i for i, room in enumerate(ROOMS) if module == room or module.startswith(f"{room}."))
    return next(found, None)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("own", "room"), [*enumerate(ROOMS)], ids=ROOMS)
def test_a_room_imports_only_what_stands_before_it(own: int, room: str) -> None:
    files = sorted(folder(room).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            found = place(module)
            if found is None and module.startswith("graphcache"):
                assert room in ("graphcache.cli", "examples"), f"{path} imports {module}"
            assert found is None or found <= own, f"{path} imports {module}"
            assert module.split(".")[0] not in ("analysis", "passes"), f"{path}: write graphcache.{module}"


def test_errors_import_nothing() -> None:
    assert [*imports(ROOT / "graphcache" / "ir" / "errors.py")] == []


def test_every_module_is_in_a_room() -> None:
    flat = {path.stem for path in (ROOT / "graphcache").glob("*.py")}
    assert flat == {"__init__", "__main__", "importers"}
    rooms = {path.name for path in (ROOT / "graphcache").iterdir() if (path / "__init__.py").exists()}
    assert rooms == {room.removeprefix("graphcache.") for room in ROOMS[:-1]}


def test_the_order_is_the_one_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = [text.index(f"`{folder(room).relative_to(ROOT)}/`") for room in ROOMS]
    assert places == sorted(places)


def test_every_module_has_its_line_in_the_table_of_tests() -> None:
    tests = Path(__file__).parents[1]
    lines = (tests / "README.md").read_text().partition("|---|---|\n")[2].splitlines()
    table = dict(line.strip("| ").split(" | ") for line in lines)
    modules = {
        f"{room.removeprefix('graphcache.').replace('.', '/')}/{path.stem}"
        for room in ROOMS[:-1]
        for path in folder(room).glob("*.py")
        if path.stem != "__init__"
    }
    assert table.keys() == modules | {"importers"}
    for files in table.values():
        for name in files.split(", "):
            assert (tests / f"{name}.py").exists(), name
