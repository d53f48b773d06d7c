"""Imported schedules beside the tools they come from: cache-dit, diffusers' MagCache, SmoothCache by hooks.

Every comparison is bit for bit: both add the same stored tensor to the same stream.
"""

import json
import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import hooks
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from graphcache import Plan, PlanError, importers
from graphcache.cli.main import app
from graphcache.ir import plantext
from pipelines import PIPELINES
from reference import Subject, subject
from reference_pipeline import fresh, transformed, untouched

MASK = [1, 0, 0, 1, 0, 1, 1, 0]
OTHER = [1, 1, 0, 1, 0, 0, 0, 1]
THIRD = [1, 0, 1, 0, 0, 1, 0, 0]
STEPS = len(MASK)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def grid(plan: Plan) -> dict[str, str]:
    return {str(row.selector): row.actions for row in plan.rows}


def text(values: Sequence[int]) -> str:
    return "".join(".#"[value] for value in values)


def predictions(on: Subject, call: Callable[..., Any], steps: int = STEPS) -> Tensor:
    """Every step's output in one loop of Euler steps that each output moves on."""
    return torch.stack([on.case.prediction(output) for output in on.sample(call, steps)])


def assert_equal(on: Subject, theirs: Tensor, plan: Plan) -> None:
    """The same bits at every step, and others than the model's without a cache."""
    ours = predictions(on, on.transform(plan), plan.steps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.allclose(predictions(on, on.model, plan.steps), theirs, rtol=1e-3, atol=1e-3)


def smoothed(on: Subject, schedule: Mapping[str, Sequence[int]]) -> nn.Module:
    """A model whose modules hand out what they returned at the latest 1 of their component's list.

    As SmoothCacheHelper of SmoothCache 0.1.1 looks them up: `attn-3` before `attn`, anything else computes.
    FLUX's single blocks stay out: a plan has no site at their `attn`.
    """
    model = on.case.make()
    for path, module in model.named_modules():
        found = re.fullmatch(r"(?!single)\w*blocks\.(\d+)\.(\w+)", path)
        keys = [f"{found[2]}-{found[1]}", found[2]] if found else []
        listed = next((schedule[key] for key in keys if key in schedule), None)
        if listed is not None:
            module.register_forward_hook(_reused(listed))
    return model


def _reused(listed: Sequence[int]) -> Callable[..., Any]:
    outputs: list[Any] = []
    steps = iter(listed)

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        outputs.append(output if next(steps) else outputs[-1])
        return outputs[-1]

    return replace


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("dit", {"attn1": MASK}),
        ("dit", {"attn1-0": MASK, "attn1-1": OTHER, "ff-0": OTHER, "ff-1": THIRD}),
        ("dit", {"attn1": MASK, "ff": OTHER, "attn1-1": THIRD, "attn1-0": MASK}),
        ("pixart", {"attn1": MASK, "attn2": OTHER, "ff": THIRD}),
        ("latte", {"attn1": MASK, "ff": OTHER}),
        ("sd3", {"attn-0": MASK, "attn-1": OTHER}),
        ("wan", {"attn1": MASK, "attn2": OTHER, "ffn": THIRD}),
        ("cogvideox", {"attn1": MASK, "ff": OTHER}),
        ("flux", {"ff_context": THIRD, "attn": MASK, "ff": OTHER}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_smoothcache_agrees(name: str, schedule: dict[str, list[int]]) -> None:
    on = subject(name)
    assert_equal(on, predictions(on, smoothed(on, schedule)), importers.smoothcache(schedule))


def test_a_file_of_smoothcache_is_read(tmp_path: Path) -> None:
    """The layout that its calibration helper writes."""
    path = tmp_path / "schedule.json"
    path.write_text('{\n    "attn1": [1,0,0,1],\n    "ff": [1,0,1,0]\n}\n')
    plan = importers.smoothcache(path)
    assert grid(plan) == {"@self": "#..#", "@joint": "#..#", "@mlp": "#.#."}
    assert importers.smoothcache(str(path)) == plan == importers.smoothcache(json.loads(path.read_text()))
    assert Plan.parse(str(plan)) == plan


def test_components_of_single_blocks_become_parts_of_the_depth() -> None:
    """A list for each of 28 blocks, as in the repository's 50-N-2-l2c.json."""
    lists = {f"mlp-{block}": [1, 0] if block % 2 else [1, 1] for block in range(28)}
    plan = importers.smoothcache(lists)
    for block in range(28):
        depth = block / 27
        (row,) = (row for row in plan.rows if row.selector.bounds[0] <= depth <= row.selector.bounds[1])
        assert row.selector.name == "mlp"
        assert row.actions == ("#." if block % 2 else "##")
    assert Plan.parse(str(plan)) == plan


def test_rows_say_which_site_a_component_is() -> None:
    schedule = {"own-1": [1, 0], "own": [1, 1], "ff": [1, 0], "mlp": [1, 1]}
    plan = importers.smoothcache(schedule, {"own": "@parallel", "ff": "blocks.*.mlp.context"}, blocks=2)
    assert grid(plan) == {
        "@parallel": "##",
        "@mlp": "##",
        "@parallel[0.5..1]": "#.",
        "blocks.*.mlp.context": "#.",
    }
    one = importers.smoothcache({"own-1": [1, 0]}, {"own-1": "blocks.1.self"})
    assert grid(one) == {"blocks.1.self": "#."}


def test_a_narrower_role_comes_after_the_wider_one() -> None:
    plan = importers.smoothcache({"attn_temp": [1, 0], "attn": [1, 1], "ff_context": [1, 0], "ff": [1, 1]})
    assert list(grid(plan)) == ["@self", "@joint", "@mlp", "@self.temporal", "@mlp.context"]


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ({}, {}, "the schedule is empty; it looks like"),
        ({"attn": []}, {}, "component 'attn' has no steps"),
        ({"attn": 1}, {}, "component 'attn' is not a list of 1"),
        ({"attn": [0, 1]}, {}, "component 'attn' starts with 0, but nothing is cached before the first step"),
        ({"attn": [1, 2]}, {}, "component 'attn', step 1: 2 is neither 1 .compute. nor 0 .reuse."),
        ({"attn": [1, 0.0]}, {}, "component 'attn', step 1: 0.0 is neither 1"),
        ({"attn": [1, 0], "ff": [1]}, {}, "component 'ff' has 1 steps, component 'attn' has 2"),
        ({"norm1": [1]}, {}, r"'norm1' is not known; known are attn, attn1, .*rows=\{'norm1': '@self'\}"),
        ({"norm1-3": [1]}, {"blocks": 4}, r"'norm1' is not known"),
        ({"x" * 99: [1]}, {}, f"'{'x' * 40}…' is not known"),
        ({"ff": [1], "mlp": [1]}, {}, r"'ff' and 'mlp' both are @mlp; .*rows=\{'mlp': '@…'\}"),
        ({"ff": [1]}, {"rows": {"norm": "@mlp"}}, "the schedule has no component 'norm'; it has 'ff'"),
        ({"ff": [1]}, {"rows": {"ff": "@feed"}}, "unknown role @feed"),
        ({"ff-3": [1]}, {}, "speaks of block 3 and names 1 in all; say how many .*blocks=4 or more"),
        ({"ff-3": [1]}, {"blocks": 3}, "speaks of block 3"),
        ({"ff-3": [1]}, {"blocks": 0}, "blocks=0: must be a whole number of at least 1"),
        (
            {"ff-0": [1]},
            {"rows": {"ff": "*.ff"}},
            r"\*\.ff cannot be narrowed to block 0; give a role",
        ),
    ],
)
def test_schedules_that_smoothcache_would_not_mean(
    schedule: Mapping[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        importers.smoothcache(schedule, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"attn": [1, true]}', r"not a schedule of SmoothCache: Expected `int`, got `bool`"),
        (b'{"attn": [1, 0.5]}', r"Expected `int`, got `float` - at `\$\[...\]\[1\]`"),
        (b"[1, 0]", "Expected `object`, got `array`"),
        (b"{", "not a schedule of SmoothCache: Input data was truncated"),
        (b'{"attn\xff": [1]}', "not a schedule of SmoothCache"),
        (b"[" * 100_000, "not a schedule of SmoothCache"),
        (b'{"attn": [0]}', "starts with 0"),
    ],
)
def test_files_that_are_no_schedule(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=rf"schedule\.json: .*{message}"):
        importers.smoothcache(path)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match=r"absent\.json: cannot be read: No such file"):
        importers.smoothcache(tmp_path / "absent.json")
    monkeypatch.setattr(plantext, "MAX_BYTES", 3)
    (tmp_path / "large.json").write_text('{"attn": [1]}')
    with pytest.raises(PlanError, match="this is no plan"):
        importers.smoothcache(tmp_path / "large.json")


@pytest.fixture
def cache_dit() -> Any:
    logging.getLogger("cache_dit").setLevel(logging.ERROR)
    return pytest.importorskip("cache_dit")


def config(cache_dit: Any, mask: list[int], front: int, back: int, **options: Any) -> Any:
    return cache_dit.DBCacheConfig(
        Fn_compute_blocks=front,
        Bn_compute_blocks=back,
        num_inference_steps=len(mask),
        steps_computation_mask=mask,
        steps_computation_policy="static",
        **options,
    )


# The lists of blocks of a model, and what its blocks take and return.
LAYOUTS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "pixart": (lambda model: model.transformer_blocks, "Pattern_3"),
    "cogvideox": (lambda model: model.transformer_blocks, "Pattern_0"),
    "wan": (lambda model: model.blocks, "Pattern_2"),
    "flux": (lambda model: [model.transformer_blocks, model.single_transformer_blocks], "Pattern_1"),
}


@pytest.mark.parametrize("mask", [MASK, OTHER], ids=text)
@pytest.mark.parametrize(("name", "blocks"), [("pixart", 2), ("cogvideox", 2), ("wan", 2), ("flux", (2, 2))])
def test_dbcache_with_a_static_mask_agrees(cache_dit: Any, name: str, blocks: Any, mask: list[int]) -> None:
    """Lists of two blocks have one between a front of one and no back. FLUX is given as two lists.

    A warm-up of 8 steps, the default, ends at the mask's first 0.
    """
    on = subject(name)
    model = on.case.make()
    lists, pattern = LAYOUTS[name][0](model), getattr(cache_dit.ForwardPattern, LAYOUTS[name][1])
    patterns = [pattern] * len(blocks) if isinstance(blocks, tuple) else pattern
    adapter = cache_dit.BlockAdapter(transformer=model, blocks=lists, forward_pattern=patterns)
    cache_dit.enable_cache(adapter, cache_config=config(cache_dit, mask, 1, 0, enable_separate_cfg=False))
    assert_equal(on, predictions(on, model), importers.steps_mask(mask, front=1, blocks=blocks))


@pytest.mark.few(3)
@pytest.mark.parametrize(("front", "back"), [(1, 0), (1, 1), (2, 1), (1, 2), (3, 0)])
def test_dbcache_over_flux_as_one_list_agrees(cache_dit: Any, front: int, back: int) -> None:
    """Its own adapter for FLUX puts double and single blocks in one list, here four of them."""
    tiny = PIPELINES["flux"]
    pipe = local(tiny.make())
    cache_dit.enable_cache(pipe, cache_config=config(cache_dit, MASK, front, back))
    theirs = tiny.generate(pipe, STEPS, guided=False)
    plan = importers.steps_mask(MASK, front, back, blocks=4)
    assert torch.equal(tiny.generate(transformed(tiny, plan), STEPS, guided=False), theirs)
    assert not torch.allclose(tiny.generate(untouched(tiny), STEPS, guided=False), theirs)


@pytest.mark.parametrize("name", ["pixart", "wan", "cogvideox", "flux"])
def test_dbcache_in_a_guided_pipeline_agrees_in_every_generation(cache_dit: Any, name: str) -> None:
    """By default FLUX's two guidance branches would share one cache and one count of steps there."""
    tiny = PIPELINES[name]
    pipe = local(tiny.make())
    separate = {"enable_separate_cfg": True} if name == "flux" else {}
    cache_dit.enable_cache(pipe, cache_config=config(cache_dit, MASK, 1, 0, **separate))
    ours = transformed(tiny, importers.steps_mask(MASK, front=1, blocks=4 if name == "flux" else 2))
    for _ in range(2):
        assert torch.equal(tiny.generate(ours, STEPS), tiny.generate(pipe, STEPS))


@pytest.mark.parametrize(("name", "order"), [("pixart", 1), ("pixart", 2), ("cogvideox", 1)])
def test_dbcache_with_taylorseer_agrees_up_to_rounding(cache_dit: Any, name: str, order: int) -> None:
    """It sums the differences of stored tensors, a plan the tensors with weights."""
    mask = [1, 1, 1, 1, 1, 0, 0, 1, 0, 0]
    tiny = PIPELINES[name]
    pipe = local(tiny.make())
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    cache_dit.enable_cache(pipe, config(cache_dit, mask, 1, 0), calibrator)
    theirs = tiny.generate(pipe, len(mask))
    plan = importers.steps_mask(mask, front=1, blocks=2, order=order)
    ours = tiny.generate(transformed(tiny, plan), len(mask))
    assert deviation(ours, theirs) < 1e-6
    reused = importers.steps_mask(mask, front=1, blocks=2)
    other = tiny.generate(transformed(tiny, reused), len(mask))
    assert deviation(other, theirs) > 1e-4


def deviation(values: Tensor, expected: Tensor) -> float:
    """The greatest difference over the greatest value."""
    return float((values - expected).abs().max() / expected.abs().max())


def local(pipe: Any) -> Any:
    """The pipeline as the only instance of its class, because cache-dit replaces the class's `__call__`."""
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    return pipe


@pytest.mark.parametrize("policy", ["slow", "fast", "ultra"])
def test_masks_that_cache_dit_makes(cache_dit: Any, policy: str) -> None:
    mask = cache_dit.steps_mask(mask_policy=policy, total_steps=28)
    assert grid(importers.steps_mask(mask)) == {"range(0.0..1.0)": text(mask)}


@pytest.mark.parametrize(
    ("front", "back", "blocks", "ranges"),
    [
        (0, 0, None, ["range(0.0..1.0)"]),
        (0, 0, 28, ["range(0..27)"]),
        (8, 0, 57, ["range(8..56)"]),
        (8, 8, (19, 38), ["range(8..10)", "range(27..48)"]),
        (10, 9, (19, 38), ["range(29..47)"]),
    ],
)
def test_the_blocks_between_front_and_back(front: int, back: int, blocks: Any, ranges: list[str]) -> None:
    plan = importers.steps_mask([True, False, torch.tensor(1)], front, back, blocks)
    assert grid(plan) == dict.fromkeys(ranges, "#.#")


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        ([], {}, "the mask has no steps"),
        (3, {}, "the mask is not a list"),
        ("10", {}, "the mask, step 0: '1' is neither"),
        ([0, 1], {}, "the mask starts with 0"),
        ([1], {"front": 8}, r"front=8 and back=0 count blocks; say how many the model has: blocks=57"),
        ([1], {"front": -1}, "front=-1: must be a whole number of at least 0"),
        ([1], {"back": True}, "back=True: must be a whole number"),
        ([1], {"front": 2, "back": 1, "blocks": (3, 2)}, "front=2 and back=1 are more than 2 blocks"),
        ([1], {"front": 1, "back": 1, "blocks": 2}, "leave no block of blocks=2 to reuse"),
        ([1], {"blocks": ()}, r"leave no block of blocks=\(\) to reuse"),
        ([1], {"blocks": 1.5}, "blocks=1.5: must be a whole number of at least 1"),
        ([1], {"order": 9}, "order=9 is not a whole number from 0 to 8"),
    ],
)
def test_masks_that_are_refused(mask: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        importers.steps_mask(mask, **options)


class Block(nn.Module):
    """What MagCache's hooks need of a block, and a count of the steps that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.computed += 1
        return hidden_states + 1


TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0))


def decided(steps: int, **options: Any) -> str:
    """What diffusers' hooks compute and skip in one generation."""
    model: Any = nn.Module()
    model.transformer_blocks = nn.ModuleList([Block(), Block()])
    hooks.apply_mag_cache(model, hooks.MagCacheConfig(num_inference_steps=steps, **options))
    counts = [0]
    for _ in range(steps):
        hidden_states = torch.zeros(1, 1, 1)
        for block in model.transformer_blocks:
            hidden_states = block(hidden_states)
        counts.append(model.transformer_blocks[0].computed)
    return "".join(".#"[after - before] for before, after in pairwise(counts))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(0.8, 1.25) | st.sampled_from([1.0, 0.97, 1.03]), min_size=1, max_size=40),
    st.none() | st.integers(1, 60),
    st.sampled_from([0.0, 0.03, 0.06, 0.12]) | st.floats(0, 1),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.1, 0.2, 0.5]) | st.floats(0, 1),
)
def test_magcache_decides_as_diffusers_hooks_do(
    ratios: list[float], steps: int | None, threshold: float, most: int, retained: float
) -> None:
    options = {"threshold": threshold, "max_skip_steps": most, "retention_ratio": retained}
    expected = decided(steps or len(ratios), mag_ratios=ratios, **options)
    assert grid(importers.magcache(ratios, steps, **options)) == {"range(0.0..1.0)": expected}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_magcache_sums_the_errors_in_the_dtype_of_the_ratios(dtype: torch.dtype) -> None:
    """The errors of three steps at 0.97 sum to 0.176, in bfloat16 to 0.1875."""
    ratios = torch.full((12,), 0.97).to(dtype)
    for threshold in (0.17, 0.18, 0.185, 0.19):
        plan = importers.magcache(ratios, threshold=threshold)
        assert grid(plan)["range(0.0..1.0)"] == decided(12, mag_ratios=ratios, threshold=threshold)


@pytest.mark.parametrize("steps", [28, 50, 20, 4, 1])
def test_magcache_with_the_ratios_of_flux(steps: int) -> None:
    ratios = FLUX_MAG_RATIOS
    expected = decided(steps, mag_ratios=ratios)
    assert grid(importers.magcache(ratios, steps)) == {"range(0.0..1.0)": expected}
    assert ("." in expected) == (steps > 1)


RATIOS = [1.0, 1.02, 1.01, 0.97, 1.0, 1.03, 0.98, 1.0]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox", "hunyuan_video", "ltx", "qwen_image"])
def test_magcache_agrees(name: str) -> None:
    """The hooks leave the text stream of a skipped step as it came in, which the output does not see."""
    on = subject(name)
    model: Any = on.case.make()
    hooks.apply_mag_cache(model, hooks.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=RATIOS))

    def call(**kwargs: Any) -> Any:
        with model.cache_context("cond"):
            return model(**kwargs)

    plan = importers.magcache(RATIOS)
    assert grid(plan) == {"range(0.0..1.0)": "##...#.."}
    assert_equal(on, predictions(on, call), plan)


@pytest.mark.parametrize(
    ("ratios", "options", "message"),
    [
        ([], {}, "mag_ratios is not a list of finite numbers, one a step"),
        ([[1.0], [1.0]], {}, "mag_ratios is not a list of finite numbers"),
        ([1.0, float("nan")], {}, "mag_ratios is not a list of finite numbers"),
        ([1.0, "much"], {}, "mag_ratios is not a list of numbers: "),
        (None, {}, "mag_ratios is not a list of numbers: "),
        ([1.0], {"steps": 0}, "a plan has 1 to"),
        ([1.0], {"threshold": -0.1}, "threshold=-0.1: must be a number from 0 to inf"),
        ([1.0], {"threshold": float("nan")}, "threshold=nan: must be a number"),
        ([1.0], {"retention_ratio": 1.5}, "retention_ratio=1.5: must be a number from 0 to 1"),
        ([1.0], {"max_skip_steps": 2.5}, "max_skip_steps=2.5: must be a whole number of at least 0"),
    ],
)
def test_ratios_that_are_refused(ratios: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        importers.magcache(ratios, **options)


DOCUMENT = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
BLOCKS = re.findall(r"^```(python[^\n]*)\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
OURS = [code for kind, code in BLOCKS if kind == "python graphcache"]
COMMANDS = re.findall(r"^    graphcache (.*)$", DOCUMENT, re.MULTILINE)
THEIRS = [code for kind, code in BLOCKS if kind == "python" and "pipe" in code and "SmoothCache" not in code]


@pytest.mark.parametrize("code", OURS)
def test_every_line_of_the_document_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny FLUX or Latte, and a generation with it; a plan for FLUX's 57 blocks is built and no more."""
    monkeypatch.chdir(tmp_path)
    Path("schedule.json").write_text('{"attn1": [1, 0, 1, 0], "ff": [1, 1, 0, 1]}')
    importers.smoothcache("schedule.json").save("plan.txt")
    tiny = PIPELINES["latte" if "fastercache" in code else "flux"]
    names: dict[str, Any] = {"pipe": fresh(tiny)}
    exec(code, names)
    plan = getattr(names["pipe"].transformer, "plan", names.get("plan"))
    if plan is not None:
        assert Plan.parse(str(plan)) == plan
        if all(row.selector.fractional for row in plan.rows):
            tiny.generate(names["pipe"], 6)


@pytest.mark.parametrize("code", THEIRS)
def test_the_lines_of_other_tools_run_too(code: str, cache_dit: Any) -> None:
    exec(code, {"pipe": local(PIPELINES["flux"].make())})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_document_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("schedule.json").write_text('{"attn1": [1, 0, 1, 0], "ff": [1, 1, 0, 1]}')
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exception is None, result.exception
    assert Plan.load("plan.txt").rows


def test_the_documents_mask_is_the_one_cache_dit_makes(cache_dit: Any) -> None:
    mask = cache_dit.steps_mask(mask_policy="fast", total_steps=28)
    assert f'"{"".join(map(str, mask))}"' in DOCUMENT
