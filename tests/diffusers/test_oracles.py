"""Plans beside diffusers' own cache hooks, which hold modules' outputs where graphcache rewrites a graph.

Both run the same loop on the same weights. Where a hook means something else than a plan, the docstring of
the test says so, and the test compares what both mean.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import hooks
from torch import Tensor

from graphcache import Plan, presets
from reference import Subject, subject

STEPS = 8
FLUX_BRANCHES = [
    r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
    r"single_transformer_blocks\.\d+\.proj_out",
]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


class Hooked:
    """A fresh copy of a subject's model that counts its steps and may be hooked."""

    def __init__(self, on: Subject) -> None:
        self.model: Any = on.case.make()
        self.step = -1

    def __call__(self, **kwargs: Any) -> Any:
        self.step += 1
        with self._context():
            return self.model(**kwargs)

    def _context(self) -> AbstractContextManager[None]:
        return self.model.cache_context("cond") if hasattr(self.model, "cache_context") else nullcontext()

    def timestep(self) -> float:
        """What pipelines publish as the current timestep, in (0, 1000]."""
        return 1000 * (1 - self.step / STEPS)


def predictions(on: Subject, call: Callable[..., Any]) -> Tensor:
    """Every step's output in one loop of Euler steps that each output moves on."""
    return torch.stack([on.case.prediction(output) for output in on.sample(call, STEPS)])


def assert_agree(on: Subject, hooked: Callable[..., Any], plan: Plan) -> None:
    """Equal up to rounding at every step, and both away from what the model computes without a cache."""
    expected = predictions(on, hooked)
    torch.testing.assert_close(predictions(on, on.transform(plan)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictions(on, on.model), expected, rtol=1e-3, atol=1e-3)


PAB = Plan.parse("""
    plan steps=8 preset=pab spatial=2 temporal=4 cross=3 start=0.25 stop=1.0
    @self           ###.#.#.
    @joint          ###.#.#.
    @self.temporal  ##..#...
    @cross          ##.#..#.
""")


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["pixart", "latte", "cogvideox", "mochi", "wan", "flux"])
def test_pyramid_attention_broadcast_agrees(name: str) -> None:
    """The hook stores what an attention module returns, both streams of it: the sites of `@self`, `@cross`
    and `@joint`, since gates, and Mochi's norms before them, come after the module.

    The timesteps of 8 steps are 1000, 875, ..., 125, so the range (100, 800) begins with step 2. The hook
    counts calls of a layer as the preset counts steps. It differs in what it takes for which kind: its
    patterns are searched anywhere in a name and spatial ones come first, so by default Latte's temporal
    blocks are spatial; and it holds the attention inside FLUX's single blocks, ahead of the projection that
    attention and MLP share, where a plan has no site. Patterns tied to the names' beginnings avoid both.
    """
    on = subject(name)
    hooked = Hooked(on)
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=4,
        cross_attention_block_skip_range=3,
        spatial_attention_block_identifiers=("^transformer_blocks", "^blocks"),
        temporal_attention_block_identifiers=("^temporal_transformer_blocks",),
        cross_attention_block_identifiers=("^transformer_blocks", "^blocks"),
        current_timestep_callback=hooked.timestep,
    )
    hooks.apply_pyramid_attention_broadcast(hooked.model, config)
    assert_agree(on, hooked, PAB)


def test_the_preset_is_the_schedule_that_pyramid_attention_broadcast_followed() -> None:
    assert presets.pab(STEPS, spatial=2, temporal=4, cross=3, start=0.25, stop=1.0) == PAB


def taylorseer(on: Subject, interval: int, order: int, **options: Any) -> Hooked:
    """The hook with differences kept in fp32 (its default is bf16) and three full steps ahead."""
    hooked = Hooked(on)
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        **options,
    )
    hooks.apply_taylorseer_cache(hooked.model, config)
    return hooked


def taylor_plan(order: int, *rows: str) -> Plan:
    return Plan.parse("\n".join([f"plan steps={STEPS}", f"t = taylorseer order={order}", *rows]))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylorseer_on_the_attention_of_double_blocks_agrees(order: int) -> None:
    """Both divide every difference by the latest spacing and lower the order of a short history.

    The hook forecasts a single step after its first full ones and counts the interval from there: 3, 5, 6
    are forecast, where the preset with three warm-up steps would forecast 3, 4, 6, 7.
    """
    on = subject("flux")
    hooked = taylorseer(on, 3, order, cache_identifiers=[r"transformer_blocks\.\d+\.attn"])
    assert_agree(on, hooked, taylor_plan(order, "@joint ###t#tt#"))


@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_on_every_branch_agrees_with_the_preset(order: int) -> None:
    """By default the hook takes the attention inside single blocks, which is no site; their sites are what
    the shared output projection returns. At interval 2 its schedule is the preset's."""
    on = subject("flux")
    hooked = taylorseer(on, 2, order, cache_identifiers=FLUX_BRANCHES)
    assert_agree(on, hooked, presets.taylorseer(STEPS, interval=2, order=order, warmup=3))


def test_lite_taylorseer_agrees_with_forecasts_of_the_output() -> None:
    """The hook's lite mode forecasts the last projection, the model's output. The preset's `lite` forecasts
    what the blocks add to the stream instead, and normalises and projects with the step's own modulation."""
    on = subject("flux")
    assert_agree(on, taylorseer(on, 3, 2, use_lite_mode=True), taylor_plan(2, "output ###t#tt#"))


def test_magcache_agrees_with_a_range_over_all_blocks() -> None:
    """Magnitude ratios of 1 make its decisions a fixed schedule: two full steps, then one of every four.

    The hook leaves the text stream of a skipped step as it came in; a plan adds the stored change to every
    stream, which the output does not see.
    """
    on = subject("flux")
    hooked = Hooked(on)
    config = hooks.MagCacheConfig(
        max_skip_steps=3, retention_ratio=0.25, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    )
    hooks.apply_mag_cache(hooked.model, config)
    assert_agree(on, hooked, Plan.parse(f"plan steps={STEPS}\nrange(0..3) ##...#.."))


@pytest.mark.parametrize(("name", "rest"), [("flux", "range(1..3)"), ("wan", "range(1..1)")])
def test_first_block_cache_agrees_with_a_range_behind_the_first_block(name: str, rest: str) -> None:
    """The hook decides by a threshold, set here before each step so that it follows the plan's row."""
    actions = "##.#..#."
    on = subject(name)
    hooked = Hooked(on)
    hooks.apply_first_block_cache(hooked.model, hooks.FirstBlockCacheConfig())
    first: Any = next(module for path, module in hooked.model.named_modules() if path.endswith("blocks.0"))
    decision = first._diffusers_hook.get_hook("fbc_leader_block_hook")

    def call(**kwargs: Any) -> Any:
        decision.threshold = -1.0 if actions[hooked.step + 1] == "#" else float("inf")
        return hooked(**kwargs)

    assert_agree(on, call, Plan.parse(f"plan steps={STEPS}\n{rest} {actions}"))


def test_fastercache_on_attention_agrees_with_linear_forecasts() -> None:
    """The hook writes its approximations into the history that the next one extrapolates; a plan never does.
    Two full steps before each approximation make both the same, and a clock that enters the hook's range of
    timesteps at the approximated steps alone imposes that."""
    actions = "##l##l##"
    on = subject("flux")
    hooked = Hooked(on)
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=100,
        spatial_attention_block_identifiers=("^transformer_blocks",),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: 500 if actions[hooked.step] == "l" else 1000,
        is_guidance_distilled=True,
        tensor_format="BCHW",
    )
    hooks.apply_faster_cache(hooked.model, config)
    plan = Plan.parse(f"plan steps={STEPS}\nl = linear weight=0.3\n@joint {actions}")
    assert_agree(on, hooked, plan)
