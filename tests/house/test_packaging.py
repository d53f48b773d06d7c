import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import graphcache

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"graphcache": "graphcache", "graphcache.analysis": "analysis", "graphcache.passes": "passes"}
LAYERS = ("graphcache.ir", "graphcache.analysis", "graphcache.passes")
OPTIONAL = (
    "cache_dit",
    "diffusers",
    "jinja2",
    "matplotlib",
    "ray",
    "scipy",
    "sklearn",
    "torchmetrics",
    "transformers",
)


def module_names() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(graphcache.__path__, "graphcache."))


def packages_on_disk() -> set[str]:
    """Every folder of Python files, under the name that it has as a package."""
    found = set()
    for package, folder in FOLDERS.items():
        base = ROOT / folder
        for file in base.rglob("*.py"):
            found.add(".".join((package, *file.parent.relative_to(base).parts)))
    return found


@pytest.mark.parametrize("name", ["analysis", "passes"])
def test_links_lead_to_the_top_level_folders(name: str) -> None:
    link = ROOT / "graphcache" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)
    assert link.resolve() == ROOT / name


def test_every_package_is_declared_and_has_an_init_file() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == packages_on_disk()
    assert setuptools["package-dir"] == FOLDERS
    for package in setuptools["packages"]:
        folder = ROOT.joinpath(*package.split("."))
        assert (folder / "__init__.py").is_file()


def test_files_that_are_no_modules_are_declared() -> None:
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = ROOT.joinpath(*package.split("."))
        other = {file for file in folder.iterdir() if file.is_file() and file.suffix != ".py"}
        assert other == {file for pattern in declared.get(package, ()) for file in folder.glob(pattern)}


def test_the_installed_version_is_the_declared_one() -> None:
    assert metadata.version("graphcache-dit") == PROJECT["project"]["version"]


def test_the_changelog_speaks_of_the_version() -> None:
    assert PROJECT["project"]["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_can_be_loaded() -> None:
    (script,) = metadata.distribution("graphcache-dit").entry_points
    assert script.name == "graphcache"
    assert callable(script.load())


@pytest.mark.parametrize("name", module_names())
def test_every_module_imports(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_analyses_and_passes_are_found_under_the_package() -> None:
    names = module_names()
    for layer in LAYERS:
        assert any(name.startswith(f"{layer}.") for name in names)


def test_the_import_needs_no_extra() -> None:
    code = "import json, sys, graphcache; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(json.loads(done.stdout))
    assert "graphcache" in loaded
    assert loaded.isdisjoint({*OPTIONAL, "analysis", "passes"})


def test_constraints_pin_torch_within_the_declared_range() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    (declared,) = (d for d in PROJECT["project"]["dependencies"] if d.startswith("torch"))
    low, high = (numbers(bound) for bound in re.findall(r"[\d.]+", declared))
    assert low <= numbers(pins["torch"]) < high


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_nothing_lies_about_in_the_repository() -> None:
    """The top level is a fixed list, and no file is a package or an archive."""
    listed = subprocess.run(("git", "ls-files"), cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [Path(line) for line in listed.splitlines()]
    folders = {"graphcache", "passes", "analysis", "tests", "examples", "docs", ".ci"}
    documents = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml"}
    named = {path.parts[0] for path in files if not path.parts[0].startswith(".")} | {".ci"}
    assert named == folders | documents
    assert not [path for path in files if path.suffix in (".whl", ".zip", ".gz", ".so", ".pkl")]
