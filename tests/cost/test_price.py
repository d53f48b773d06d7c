"""What plans cost at other sizes: against runs there, counted by PyTorch, and the tensors that those hold."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graphcache
from graphcache import CaptureError, Plan, PlanError, presets
from graphcache.cost.pricing import Price, cheapest
from reference import assert_same
from sized import SIZES, Call, Sizes, Subject, subject
from tiny import TinyDiT, tiny


def of_tiny(kind: type[TinyDiT] = TinyDiT) -> Subject:
    return Subject(
        tiny(2, kind),
        {"batch": 2, "tokens": 3},
        lambda at: {"text": torch.randn(at["batch"], 4)},
        lambda at, step, t: {
            "x": torch.randn(at["batch"], at["tokens"], 4),
            "timestep": torch.full((at["batch"],), t),
        },
        "timestep",
    )


PLANS = {
    "fora": presets.fora(5, 2),
    "taylorseer": presets.taylorseer(5, interval=3, order=2),
    "range": Plan.parse("plan steps=4\nrange(0..1) #.#."),
    "output": Plan.parse("plan steps=4\noutput #.#."),
    "fraction": Plan.parse("plan steps=5\na = tokens .5 by random multiple=1\n@mlp #aa#a"),
    "number": Plan.parse("plan steps=4\na = tokens 3 by norm multiple=1\n@mlp #aa."),
    "two budgets": Plan.parse(
        "plan steps=4\na = tokens .3 by random multiple=2\nb = tokens 5 by norm multiple=1\n"
        "@mlp[0..0.5] #a.#\n@mlp[0.5..1] #bb."
    ),
}


@dataclass(frozen=True)
class Ran:
    """What a generation computed and held, measured."""

    flops: int
    held_bytes: int


def run(model: Any, steps: Sequence[Sequence[tuple[str, Call]]]) -> Ran:
    """Each step is calls, each in a context of its name; a generation before captured the model.

    Of attention's kernels PyTorch counts the plain one alone.
    """
    held = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                for calls in steps:
                    for name, call in calls:
                        with model.cache_context(name) if name else nullcontext():
                            model(**call)
                    held.append(model.summary().held_bytes if hasattr(model, "summary") else 0)
    return Ran(counter.get_total_flops(), max(held))


def check(on: Subject, found: Price, plan: Plan, sizes: Sizes) -> None:
    """A price is what a run of the plan at these sizes computes and holds."""
    steps = [[("", call)] for call in on.calls(sizes, plan.steps)]
    model = graphcache.transform(on.model, plan, timestep=on.timestep)
    ran, plain = run(model, steps), run(on.model, steps)
    assert (found.sizes, found.steps) == (sizes, plan.steps)
    assert found.flops == ran.flops
    # the untouched model may compute what no result needs
    assert 0 <= found.share - ran.flops / plain.flops < 0.002
    assert found.held_bytes == ran.held_bytes
    assert found.peak_bytes == model.summary().branches[0].peak_bytes >= found.held_bytes


@pytest.mark.few(1)
@pytest.mark.parametrize("priced", SIZES)
def test_prices_are_what_runs_there_compute_and_hold(priced: str) -> None:
    plans = PLANS if priced in ("pixart", "flux") else {"taylorseer": PLANS["taylorseer"]}
    found = subject(priced).priced(plans, *SIZES[priced])
    places = [(sizes, plan) for sizes in SIZES[priced] for plan in plans]
    assert [item.plan for item in found] == [plan for _, plan in places]
    for price, (sizes, plan) in zip(found, places, strict=True):
        check(subject(priced), price, plans[plan], sizes)


GUIDED = {
    "difference": "guidance #.#.",
    "with branches": "t = taylorseer order=1\n@self ##t#\nguidance #.#.",
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("plan", "sizes"), [*zip(GUIDED, ({"height": 4, "width": 12}, {"batch": 3, "text": 5}), strict=True)]
)
def test_two_calls_a_step_have_a_price_together(plan: str, sizes: Sizes) -> None:
    on, guided = subject("pixart"), Plan.parse(f"plan steps=4\n{GUIDED[plan]}")
    found, both = on.priced({"guided": guided, "plain": presets.compute(4)}, sizes)
    texts = [on.static({**on.sizes, **sizes}) for _ in range(2)]
    moving = [on.moving({**on.sizes, **sizes}, step, 1 - step / 4) for step in range(4)]
    steps = [[(n, t | now) for n, t in zip(("cond", "uncond"), texts, strict=True)] for now in moving]
    model = graphcache.transform(on.model, guided, timestep=on.timestep)
    ran = run(model, steps)
    assert (found.flops, found.held_bytes) == (ran.flops, ran.held_bytes)
    peaks = [branch.peak_bytes for branch in model.summary().branches]
    assert max(*peaks, found.held_bytes) <= found.peak_bytes <= sum(peaks)
    plain = run(on.model, [[("", call) for _, call in step] for step in steps])
    assert [item.share for item in (found, both)] == [item.flops / plain.flops for item in (found, both)]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("half", "sizes"), [("first", {"batch": 4, "text": 5}), ("last", {"height": 4, "width": 12})]
)
def test_a_doubled_batch_has_a_price(half: str, sizes: Sizes) -> None:
    on = subject("pixart")
    doubled = replace(on, moving=lambda at, step, t: _twice(on.moving(at, step, t)))
    plan = Plan.parse(f"plan steps=4 conditional={half}\nt = taylorseer order=1\n@mlp ##t#\nguidance #.#.")
    (found,) = doubled.priced({half: plan}, sizes)
    check(doubled, found, plan, sizes)


def _twice(call: Call) -> Call:
    """The latents of the batch's first half in both."""
    latents = call["hidden_states"]
    return call | {"hidden_states": latents[: len(latents) // 2].repeat(2, 1, 1, 1)}


def test_guidance_halves_that_are_no_halves_are_refused() -> None:
    plan = Plan.parse("plan steps=4 conditional=last\nguidance #.#.")
    with pytest.raises(PlanError, match=r"x is for guidance on a doubled batch .* halves of the example's"):
        subject("pixart").priced({"x": plan})


def test_as_many_calls_as_are_said_cost_as_much_each() -> None:
    one, two = (of_tiny().priced({"fora": PLANS["fora"]}, calls=calls)[0] for calls in (1, 2))
    assert (two.flops, two.held_bytes, two.share) == (2 * one.flops, 2 * one.held_bytes, one.share)


class Positioned(TinyDiT):
    """A table of positions, learned for three tokens."""

    def __init__(self, depth: int = 1, dim: int = 4) -> None:
        super().__init__(depth, dim)
        self.positions = nn.Parameter(torch.ones(3, dim))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x + self.positions, timestep, text)


class Padded(TinyDiT):
    """Pads its tokens to a multiple of four."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4))
        return super().forward(padded, timestep, text)[:, : x.shape[1]]


class Special(TinyDiT):
    """Has a block less at six tokens."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        gate = (self.time(timestep[:, None]) + self.text(text))[:, None]
        for block in self.blocks[: len(self.blocks) - (x.shape[1] == 6)]:
            x = block(x, gate)
        return x


class Deciding(TinyDiT):
    """Looks at what its weights make of the text."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * 2 if self.text(text).sum() > 0 else x, timestep, text)


@pytest.mark.parametrize("tokens", [4, 6, 7, 12])
@pytest.mark.parametrize("kind", [Padded, Special])
def test_what_a_model_does_at_some_sizes_alone_is_priced(kind: type[TinyDiT], tokens: int) -> None:
    on = of_tiny(kind)
    (found,) = on.priced({"fora": PLANS["fora"]}, {"tokens": tokens})
    check(on, found, PLANS["fora"], {"tokens": tokens})


def test_a_size_that_the_model_refuses_is_named_with_the_models_own_reason() -> None:
    on = of_tiny(Positioned)
    told = r"^tokens=4: the model itself fails .*positions.*length 3.*as the example"
    with pytest.raises(CaptureError, match=told):
        on.priced(PLANS, {"batch": 3, "tokens": 4})
    with pytest.raises(CaptureError, match=r"depth=2: the sizes of this call are batch, tokens, each"):
        on.priced(PLANS, {"depth": 2})
    with pytest.raises(CaptureError, match="tokens=0"):
        on.priced(PLANS, {"tokens": 0})


def test_what_weights_decide_has_a_price_where_the_model_may_be_called(captured_anew: None) -> None:
    on, plan = of_tiny(Deciding), PLANS["fora"]
    (found,) = on.priced({"fora": plan})
    model = graphcache.transform(on.model, plan)
    run(model, [[("", call)] for call in on.calls({}, 5)])
    assert found.flops == model.summary().branches[0].flops
    with pytest.raises(CaptureError, match=r"looks at values that its weights .*self.text.*as the example"):
        on.priced({"fora": plan}, {"batch": 3})


def test_nothing_is_computed_or_held_that_large() -> None:
    """One attention's scores would take 64 TiB."""
    on = of_tiny()
    before = {name: value.clone() for name, value in on.model.state_dict().items()}
    (found,) = on.priced({"fora": PLANS["fora"]}, {"tokens": 1 << 20, "batch": 16})
    assert found.flops > 3 * 2 * 16 * 16 * (1 << 40)
    assert_same(on.model.state_dict(), before)


def test_the_cheapest_plan_depends_on_the_size() -> None:
    """Attention is what a long sequence costs, and MLPs are what a short one does."""
    rows = {"self": "##..", "mlp": "#..."}
    plans = {role: Plan.parse(f"plan steps=4\n@{role} {actions}") for role, actions in rows.items()}
    best = cheapest(of_tiny().priced(plans, {"tokens": 2}, {"tokens": 400}))
    assert [(item.sizes["tokens"], item.plan) for item in best] == [(2, "mlp"), (400, "self")]
