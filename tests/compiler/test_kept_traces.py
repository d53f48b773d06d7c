"""Traces with symbols kept on disk: another process serves sizes that nobody has called, and traces none."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers.models.attention_dispatch  # noqa: F401  (it is a mode around calls, once it is there)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphcache
from counted import PLAN, compilations, generation, traces
from graphcache.compiler.capture_file import Content, decoded, encoded
from graphcache.ir.structure import structure
from inside import programs_of
from other_process import printed
from reference import assert_same
from sized import Sizes, subject
from tiny import TinyDiT, arguments, tiny

ELSEWHERE: Mapping[str, Sizes] = {
    "pixart": {"batch": 3, "height": 4, "width": 20, "text": 5},
    "sd3": {"width": 4, "batch": 5},
    "flux": {"tokens": 36, "text": 40},
    "qwen_image": {"text": 4, "height": 12, "width": 6},
    "wan": {"frames": 5, "height": 12, "text": 4},
}
FIRST, *OTHERS = {"tokens": 3}, {"tokens": 9}, {"tokens": 8, "batch": 3}, {"tokens": 17, "batch": 5}


@pytest.fixture(autouse=True)
def _alone(captured_anew: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def made_in(folder: Path, sizes: str = "any", **options: Any) -> Any:
    return graphcache.transform(tiny(), PLAN, captures=folder, sizes=sizes, **options)


def graph(model: Any) -> str:
    step = programs_of(model)[-1].captured.step
    return structure(step.graph, step.root)


@pytest.mark.few(1)
@pytest.mark.parametrize("sized", ELSEWHERE)
def test_a_size_is_filled_in_as_by_a_new_trace(sized: str, tmp_path: Path) -> None:
    on = subject(sized)
    options: Any = {"timestep": on.timestep, "sizes": "any"}
    calls = list(on.calls(ELSEWHERE[sized], PLAN.steps))
    anew: Any = graphcache.transform(on.model, PLAN, captures=tmp_path, **options)
    anew(**on.example())
    anew.reset()
    expected = [anew(**call) for call in calls]
    again: Any = graphcache.transform(on.model, PLAN, captures=tmp_path, **options)
    with traces() as made:
        found = [again(**call) for call in calls]
    assert str(made) == "0+0"
    assert again.summary().branches[0].from_disk
    assert_same(found, expected)
    assert graph(again) == graph(anew)


@pytest.mark.parametrize("begins", [FIRST, OTHERS[1]], ids=["as_before", "elsewhere"])
def test_code_for_any_size_is_made_at_the_first_as_before(begins: Sizes, tmp_path: Path) -> None:
    generation(made_in(tmp_path), **FIRST)
    plain = {at["tokens"]: generation(graphcache.transform(tiny(), PLAN), **at) for at in (FIRST, *OTHERS)}
    with traces() as made, compilations() as compiled:
        again = made_in(tmp_path, backend="inductor")
        for place, at in enumerate((begins, *OTHERS, FIRST)):
            ours = list[Tensor]()
            fixed, for_any = compiled.since(lambda at=at: ours.extend(generation(again, **at)))  # noqa: B023
            assert (fixed, for_any > 0) == (0, not place)
            assert_same(ours, plain[at["tokens"]])
    assert str(made) == "0+0"


def test_sizes_after_the_second_are_filled_in_too(tmp_path: Path) -> None:
    made = made_in(tmp_path, "auto")
    for at in (FIRST, *OTHERS[:2]):
        generation(made, **at)
    again = made_in(tmp_path, "auto")
    with traces() as count:
        for tokens in (3, 9, 21, 22):
            generation(again, tokens=tokens)
    assert str(count) == "0+0"


def test_another_process_traces_no_new_size(tmp_path: Path) -> None:
    generation(made_in(tmp_path), **FIRST)
    text = """
import sys, torch, graphcache, diffusers.models.attention_dispatch
from tiny import arguments, tiny
torch.export.export = None
plan = graphcache.presets.taylorseer(4, interval=2)
model = graphcache.transform(tiny(), plan, captures=sys.argv[1], sizes="any")
with torch.no_grad():
    call = arguments(tokens=11, batch=4)
    assert torch.equal(model(**call), tiny()(**call))
print(model.summary().branches[0].from_disk)
"""
    assert printed(text, str(tmp_path)) == ["True"]


class Counts(TinyDiT):
    """Makes a constant of a size."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * (1 + len(range(x.shape[1]))), timestep, text)


def test_a_constant_that_was_a_size_is_found_out_in_another_process(tmp_path: Path) -> None:
    for tokens in (3, 4, 5):
        model = tiny(1, Counts)
        made = graphcache.transform(model, PLAN, captures=tmp_path, sizes="any")
        for at in (tokens, 8):
            assert_same(generation(made, tokens=at)[0], model(**arguments(tokens=at)))


@cache
def kept() -> tuple[str, bytes]:
    """The file of a trace, and its name."""
    with TemporaryDirectory() as name, torch.no_grad():
        generation(made_in(Path(name)), **FIRST)
        (file,) = Path(name).iterdir()
        return file.name, file.read_bytes()


def right_with(blob: bytes) -> bool:
    """Whether the model whose trace this is was traced; it is right anyhow, and so is the next one."""
    with TemporaryDirectory() as name:
        Path(name, kept()[0]).write_bytes(blob)
        with traces() as count:
            made = made_in(Path(name))
            for at in (FIRST, OTHERS[1]):
                assert_same(generation(made, **at)[0], tiny()(**arguments(**at)))
        again = made_in(Path(name))
        with traces() as none:
            generation(again, **OTHERS[2])
        assert str(none) == "0+0"
        return count.any > 0


def test_a_file_as_it_was_is_used() -> None:
    assert not right_with(kept()[1])


@settings(max_examples=6)
@given(st.data())
def test_a_changed_byte_changes_no_result(data: st.DataObject) -> None:
    whole = bytearray(kept()[1])
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    assert right_with(bytes(whole))


def other_size(content: Content) -> None:
    line = next(line for line in content.graph.nodes if line.target == "aten.sym_size.int")
    line.args = {"tuple": [line.args["tuple"][0], {"int": "1"}]}


FORGERIES: dict[str, Callable[[Content], Any]] = {
    "another size": other_size,
    "a shape of other dimensions": lambda content: content.shapes[-1].__setitem__(0, (3,)),
    "a shape of nothing": lambda content: content.shapes[-1].__setitem__(0, (0, 0, 0)),
    "fewer shapes": lambda content: content.shapes[-1].pop(),
    "an operation that is none": lambda content: setattr(content.graph.nodes[-2], "target", "os.system"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_trace_is_not_used(forgery: str) -> None:
    content = decoded(kept()[1])
    FORGERIES[forgery](content)
    assert right_with(encoded(content))


def test_other_sizes_that_the_model_has_not_are_no_error() -> None:
    content = decoded(kept()[1])
    content.shapes[:] = [[(shape[0] + place, *shape[1:]) for place, shape in enumerate(content.shapes[0])]]
    assert not right_with(encoded(content))
