"""Private names of other libraries are used in the seams alone, and one that is gone is told by its name."""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.hooks  # noqa: F401
import diffusers
import diffusers.hooks
import diffusers.models.attention_dispatch
import pytest
import torch
from torch import nn

from graphcache.libraries import (
    accelerate_private,
    diffusers_private,
    torch_compilers_private,
    torch_private,
)
from graphcache.libraries.private import MissingName, names_of
from pipelines import PIPELINES

ROOT = Path(__file__).parents[2]
SEAMS = {
    torch_private: "torch",
    torch_compilers_private: "torch",
    diffusers_private: "diffusers",
    accelerate_private: "accelerate",
}
LIBRARIES = "torch|diffusers|accelerate|peft|transformers"
ANYWHERE = {*torch_private.MODULE_TABLES, *torch_private.FORWARD_HOOKS}
PYTHON = {"_fields", "_replace", "_getframe", "_get_running_loop", "_thread", "_pytest"}
"""Private by name, but documented, of Python's own library, or of pytest, which has tests' functions."""
OWN = {"_graphcache", "_graphcache_kind"}
"""The slots in which a transformed model has its engine, and a checked pipeline its own class."""


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def own_attributes(tree: ast.AST, bases: bool = True) -> Iterator[str]:
    """Attributes that classes of a file and of those that it imports define; functions are no attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield item.name
                elif isinstance(item, ast.Assign | ast.AnnAssign):
                    targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                    yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif bases and isinstance(node, ast.ImportFrom) and str(node.module).startswith("graphcache."):
            path = ROOT.joinpath(*str(node.module).split(".")).with_suffix(".py")
            yield from own_attributes(ast.parse(path.read_text()), bases=False) if path.exists() else ()


def own_names(tree: ast.AST) -> Iterator[str]:
    """What a file defines, which annotations mention as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def private_uses(source: str) -> Iterator[str]:
    """Other libraries' private names that a file uses."""
    tree = ast.parse(source)
    attributes = {*own_attributes(tree)} | ANYWHERE | PYTHON | OWN
    texts = attributes | {*own_names(tree)}
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        paths: list[str] = []
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in attributes:
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            if is_private(node.value) and node.value not in texts:
                yield node.value
            paths = [node.value]
        for path in paths:
            yield from re.findall(rf"\b(?:{LIBRARIES})(?:\.\w+)*?\.(_[A-Za-z]\w*)", path)


def library_files() -> list[Path]:
    folders = [ROOT / name for name in ("analysis", "passes", "graphcache")]
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    return sorted(files - {Path(seam.__file__ or "") for seam in SEAMS})


def test_the_seams_alone_use_private_names() -> None:
    files = library_files()
    assert len(files) > 150
    uses = {str(path.relative_to(ROOT)): [*private_uses(path.read_text())] for path in files}
    assert {path: found for path, found in uses.items() if found} == {}


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("import torch._dynamo", "_dynamo"),
        ("from torch._subclasses import FakeTensor", "_subclasses"),
        ("from torch.nn.attention import _cur_sdpa_kernel_backends", "_cur_sdpa_kernel_backends"),
        ("from torch.utils import _pytree as pytree", "_pytree"),
        ("from peft.tuners.lora.layer import _x", "_x"),
        ("from transformers._private import this", "_private"),
        ("import torch\ntorch._C.this()", "_C"),
        ("def version(tensor):\n    return tensor._version", "_version"),
        ("def _version(tensor):\n    return tensor._version", "_version"),
        ("class Mine(Theirs):\n    def __init__(self):\n        self._theirs()", "_theirs"),
        ("module._compiled_call_impl = None", "_compiled_call_impl"),
        ("getattr(module, '_hf_hook', None)", "_hf_hook"),
        ("vars(module)['_diffusers_hook']", "_diffusers_hook"),
        ("logging.getLogger('torch._subclasses.fake_tensor')", "_subclasses"),
        ("operator.attrgetter('_interrupt')", "_interrupt"),
        ("aten._softmax.default", "_softmax"),
    ],
)
def test_a_planted_name_is_found(planted: str, name: str) -> None:
    assert [*private_uses(planted)] == [name]


@pytest.mark.parametrize(
    "planted",
    [
        "module._parameters",
        "state['_forward_hooks']",
        "call._replace(step=1)",
        "class Mine:\n    def __init__(self):\n        self._kept = 1\n    def twin(self, other):\n"
        "        return other._kept",
        "class _Mine:\n    def __lt__(self, other: '_Mine'): ...",
        '"""Words about torch._dynamo."""',
        "torch.__version__",
    ],
)
def test_what_everyone_may_use_is_left(planted: str) -> None:
    assert [*private_uses(planted)] == []


LATER = {
    *("_torchdynamo_disable", "_torchdynamo_disable_msg", "_class_name", "_num_timesteps"),
    "_use_default_values",
}
"""Names that only a user's things have; what PyTorch makes of the first two is in test_compile_order."""
NAMES = [
    *((torch_private, name) for name in sorted(ANYWHERE)),
    *((seam, name) for seam in SEAMS for name in sorted({*private_uses(inspect.getsource(seam))} - LATER)),
]


def without(seam: ModuleType, name: str) -> dict[str, Any]:
    """The seam as it would be if the library called something otherwise."""
    source = re.sub(rf"\b{name}\b", f"{name}_gone", inspect.getsource(seam))
    made: dict[str, Any] = {"__name__": f"{seam.__name__}_without"}
    exec(compile(source, str(seam.__file__), "exec"), made)
    return made


def use(seam: dict[str, Any]) -> None:
    """What captures and calls ask a seam for."""
    for name in ("verify", "attention_backend"):
        seam.get(name, bool)()
    if "compiled_module" in seam:
        seam["compiled_module"](torch.compile(nn.Identity(), backend="eager"))


@pytest.mark.parametrize(("seam", "name"), NAMES)
def test_a_name_that_is_gone_is_told(seam: ModuleType, name: str) -> None:
    library = SEAMS[seam]
    requirement = next(text for text in metadata.requires("graphcache-dit") or () if text.startswith(library))
    with pytest.raises(MissingName) as caught:
        use(without(seam, name))
    said = str(caught.value)
    assert f"{name}_gone" in said
    assert f"{library} {sys.modules[library].__version__} lacks" in said
    assert requirement.partition(";")[0].strip() in said


@pytest.mark.parametrize("seam", SEAMS)
def test_no_name_of_these_versions_is_gone(seam: ModuleType) -> None:
    use(without(seam, "nothing"))
    assert sum(of == seam for of, _ in NAMES) >= 2


def test_what_a_library_itself_lacks_is_said_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'torch_absent'$"), names_of("torch"):
        import torch_absent  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(MissingName, match=r"No module named 'torch\._absent'"), names_of("torch"):
        import torch._absent  # type: ignore[import-not-found]  # noqa: F401


def test_pipelines_keep_their_number_of_steps_where_it_is_looked_for() -> None:
    kinds = {type(PIPELINES[name].build()) for name in ("wan", "pixart", "flux")}
    says = [kind for kind in kinds if isinstance(getattr(kind, "num_timesteps", None), property)]
    assert len(says) >= 2
    for kind in says:
        running = object.__new__(kind)
        vars(running)["_num_timesteps"] = 7
        assert running.num_timesteps == 7
        assert diffusers_private.announced_steps(running) == 7


def test_a_pipeline_that_keeps_its_number_of_steps_elsewhere_is_told() -> None:
    made = type("Pipeline", (), {"num_timesteps": 7, "__module__": "diffusers.pipelines.new"})()
    with pytest.raises(MissingName, match=r"no attribute '_num_timesteps'.*diffusers>="):
        diffusers_private.announced_steps(made)
    assert diffusers_private.announced_steps(SimpleNamespace(num_timesteps=1000)) is None
    assert diffusers_private.announced_steps(None) is None


def test_a_saved_model_names_its_class_where_it_is_looked_for(tmp_path: Path) -> None:
    diffusers.AutoencoderTiny().save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved[diffusers_private.CLASS_NAME] == "AutoencoderTiny"


@pytest.mark.parametrize("depends", [True, False])
def test_symbols_that_depend_on_data_are_named_as_without(depends: bool) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.nonzero() + 1 if depends else x + 1

    def names() -> list[Any]:
        graph = torch.export.export(Model(), (torch.ones(3),)).graph
        return [(node.name, str(node.meta.get("unbacked_bindings"))) for node in graph.nodes]

    expected = names()
    with torch_compilers_private.unbacked_symbols_where_there_are_any():
        assert names() == expected
    assert any(named != "None" for _, named in expected) == depends
