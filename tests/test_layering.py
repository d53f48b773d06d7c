"""Each folder imports only what stands to its left: ir, analysis, passes, graphcache, examples."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("graphcache.ir", "graphcache.analysis", "graphcache.passes", "graphcache", "examples")
FOLDERS = ("graphcache/ir", "analysis", "passes", "graphcache", "examples")


def layer(module: str) -> int | None:
    """The layer of a module; None of modules from elsewhere."""
    found = (i for i, name in enumerate(LAYERS) if module == name or module.startswith(f"{name}."))
    return next(found, None)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder: str) -> list[Path]:
    if folder != "graphcache":
        return sorted((ROOT / folder).rglob("*.py"))
    return sorted([*(ROOT / folder).glob("*.py"), *(ROOT / folder / "page").glob("*.py")])


@pytest.mark.parametrize(("own", "folder"), [*enumerate(FOLDERS)], ids=FOLDERS)
def test_a_folder_imports_only_what_stands_to_its_left(own: int, folder: str) -> None:
    files = sources(folder)
    assert files
    for path in files:
        for module in imports(path):
            found = layer(module)
            assert found is None or found <= own, f"{path} imports {module}"
            assert module.split(".")[0] not in ("analysis", "passes"), f"{path}: write graphcache.{module}"
