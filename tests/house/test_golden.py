"""Golden texts carry the names of their tests: one that no test reads any more is a stray."""

import ast
from collections.abc import Iterator
from pathlib import Path


def readers(file: Path) -> Iterator[str]:
    """The names, without `test_`, of a file's tests that read golden texts."""
    for node in ast.walk(ast.parse(file.read_text())) if file.exists() else ():
        if isinstance(node, ast.FunctionDef) and "golden" in [argument.arg for argument in node.args.args]:
            yield node.name.removeprefix("test_")


def strays(tests: Path) -> list[Path]:
    """Texts within `golden` folders that are not where one of the tests beside the folder looks for them."""
    texts = [path for path in tests.rglob("golden/**/*") if path.is_file()]
    owned = {
        text
        for text in tests.rglob("golden/*/*.txt")
        for name in readers(text.parents[2] / f"{text.parent.name}.py")
        if text.stem == name or text.stem.startswith(f"{name}_")
    }
    return sorted({*texts} - owned)


def test_every_golden_text_has_its_test() -> None:
    assert strays(Path(__file__).parents[1]) == []


def test_strays_are_found(tmp_path: Path) -> None:
    room = tmp_path / "passes"
    (room / "golden" / "test_some").mkdir(parents=True)
    (room / "test_some.py").write_text("def test_one(golden): ...\ndef test_other(): ...\n")
    read = room / "golden" / "test_some" / "one_a.txt"
    others = [room / "golden" / name for name in ("one.txt", "test_some/other.txt")]
    for path in (read, *others):
        path.write_text("")
    assert strays(tmp_path) == others
    (room / "test_some.py").unlink()
    assert strays(tmp_path) == sorted([read, *others])
