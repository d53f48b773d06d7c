"""Profiles against real runs: what an estimate says of a site is what happens when it is replaced."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graphcache
from examples.digits.model import ddim_scheduler, load_model
from examples.digits.sample import sample as sample_digits
from graphcache import GraphCacheError, Plan, PlanError, Profile, load_profile
from graphcache.compiler.program import Program
from graphcache.ir.graph import value_of
from graphcache.ir.letter import Letter
from graphcache.ir.plan import Row
from graphcache.ir.roles import Names
from graphcache.ir.selector import Selector
from graphcache.planning.comparison import compare
from graphcache.planning.sampling import Sampling, with_frozen_weights
from graphcache.planning.subject import Subject as Described
from graphcache.planning.subject import describe
from graphcache.planning.tuning import tune
from graphcache.runtime.engine import Engine
from graphcache.runtime.options import Options
from linear import LinearDiT, Replanned, Sampler, linear
from pipelines import PIPELINES
from profiled import levels, profiled
from reference import Subject, subject

STEPS, WINDOW = 6, 3
MODES = [None, "first", "last", "calls"]


class Measured:
    """The profile of the linear model, with what came back as probes."""

    def __init__(self, mode: str | None, folds: str | None = None) -> None:
        self.mode, self.sampler, self.model = mode, Sampler(mode), linear(folds=folds)
        conditional = mode if mode in ("first", "last") else None
        self.samples, self.probes = (5, 8), 2
        self.profile = graphcache.profile(
            self.model,
            self.samples,
            steps=STEPS,
            sampler=self.sampler,
            probes=self.probes,
            window=WINDOW,
            conditional=conditional,
        )
        self.replanned = Replanned(self.model, STEPS)

    def run(self, sample: int, plan: Plan | None) -> Tensor:
        with torch.no_grad():
            return self.sampler(self.replanned.under(plan or Plan(STEPS)), sample, STEPS)

    def effects(self, plan: Plan) -> np.ndarray:
        """(probes, samples): the probes' products with what a plan changes, by real runs."""
        parts = []
        for number, sample in enumerate(self.samples):
            change = (self.run(sample, plan) - self.run(sample, None)).double()
            directions = self.sampler.directions[number * self.probes :][: self.probes]
            parts.append(torch.stack([(d.double() * change).flatten(1).sum(1) for d in directions]))
        return torch.cat(parts, dim=1).numpy()


@cache
def measured(mode: str | None) -> Measured:
    return Measured(mode)


def replacing(site: str, step: int, weights: Sequence[float], conditional: str | None) -> Plan:
    """The site computed at all steps but one, where the values before it are combined."""
    actions = "#" * step + "f" + "#" * (STEPS - step - 1)
    if site == "guidance":
        return Plan(
            STEPS, rows=(Row(Selector.parse(site), actions.replace("f", ".")),), conditional=conditional
        )
    row = Row(Selector.parse(site), actions, ((step, tuple(weights)),))
    return Plan(STEPS, (Letter("f", "fitted", (("order", WINDOW - 1),)),), (row,))


@pytest.mark.parametrize("mode", MODES)
def test_effects_of_a_linear_model_are_those_of_real_runs(mode: str | None) -> None:
    on = measured(mode)
    table = on.profile.effects
    names = [site.name for site in on.profile.sites]
    assert ("guidance" in names) is (mode is not None)
    assert {"blocks.0.mlp", "blocks.2.mlp.1", "range(0..2)", "range(0..1)", "output"} < set(names)
    for site in names:
        place = on.profile.index(site)
        for step, weights in ((1, (1.0,)), (4, (0.0, 0.0, 1.0)), (5, (1.7, -0.4, -0.2))):
            used = (1.0,) if site == "guidance" else weights
            plan = replacing(site, step, used, on.profile.provenance.conditional)
            real = on.effects(plan)
            estimated = (
                sum(w * table[place, step, gap] for gap, w in enumerate(used, 1)) - table[place, step, 0]
            )
            assert np.abs(real).max() > 1e-4, (site, step)
            np.testing.assert_allclose(estimated, real, rtol=1e-4, atol=1e-4 * np.abs(real).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("folds", ["samples", "tokens"])
def test_samples_whose_rows_are_folded_are_told_apart_where_they_lie_together(
    mode: str | None, folds: str
) -> None:
    on = Measured(mode, folds)
    for site in ("blocks.1.mlp", "range(0..1)"):
        table = on.profile.effects[on.profile.index(site)]
        real = on.effects(replacing(site, 3, (1.0,), None))
        if folds == "tokens":  # then only the sum over both samples of a generation is known
            real = np.stack([real[:, 0::2] + real[:, 1::2], np.zeros((2, 2))], axis=-1).reshape(2, 4)
        assert np.abs(real[:, 0::2]).min() > 1e-4
        np.testing.assert_allclose(table[3, 1] - table[3, 0], real, rtol=1e-4, atol=1e-6)


def test_effects_before_the_first_step_are_none() -> None:
    table = measured(None).profile.effects
    assert table.dtype == np.float32
    assert table.shape[2:] == (WINDOW + 1, 2, 4)
    for step in range(STEPS):
        assert not table[:, step, step + 1 :].any()


def values_by_hand(mode: str | None, sample: int) -> dict[str, list[list[Tensor]]]:
    """By site and step what modules computed, one tensor for every call."""
    model, found = linear(), dict[str, list[list[Tensor]]]()
    calls = 2 if mode == "calls" else 1
    latest: dict[str, Tensor] = {}

    def keep(site: str, value: Tensor) -> None:
        steps = found.setdefault(site, [[]])
        if len(steps[-1]) == calls:
            steps.append([])
        steps[-1].append(value)

    def block(number: int) -> Callable[..., None]:
        def before(module: nn.Module, args: Any) -> None:
            latest[str(number)] = args[0]

        model.blocks[number].register_forward_pre_hook(before)

        def after(module: nn.Module, args: Any, result: Tensor) -> None:
            if number in (1, 2):
                keep(f"range(0..{number})", result - latest["0"])
            if number == 2:
                keep("output", result)

        return after

    for number in range(3):
        model.blocks[number].register_forward_hook(block(number))
        model.blocks[number].one.register_forward_hook(
            lambda module, args, result, site=f"blocks.{number}.mlp": keep(site, result)
        )
        model.blocks[number].down.register_forward_hook(
            lambda module, args, result, site=f"blocks.{number}.mlp.1": keep(site, result)
        )
    with torch.no_grad():
        Sampler(mode)(model, sample, STEPS)
    if mode is not None:
        pairs = [tensors if mode == "calls" else tensors[0].chunk(2) for tensors in found["output"]]
        found["guidance"] = [[one - other] for one, other in pairs]
    return found


@pytest.mark.parametrize("mode", MODES)
def test_gram_matrices_are_products_of_the_values(mode: str | None) -> None:
    on = measured(mode)
    expected: dict[str, Any] = dict.fromkeys([site.name for site in on.profile.sites], 0)
    for sample in on.samples:
        for name, steps in values_by_hand(mode, sample).items():
            flat = torch.stack([torch.cat([item.flatten() for item in step]) for step in steps]).double()
            expected[name] = expected[name] + (flat @ flat.T).numpy()
    for name, gram in expected.items():
        np.testing.assert_allclose(on.profile.gram[on.profile.index(name)], gram, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_profile_says_what_it_is_of(mode: str | None) -> None:
    found = measured(mode).profile
    assert found.steps == STEPS
    assert found.window == WINDOW
    assert found.calls == (2 if mode == "calls" else 1)
    assert found.numbers == 3 * 4
    assert found.provenance.samples == 2
    # what pip says of a wheel may leave out for which device it was built
    assert found.provenance.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found.timings == {}
    sites = {site.name: site for site in found.sites}
    rows = 4 if mode in ("first", "last") else 2
    assert sites["blocks.0.mlp"].bytes_kept == rows * 3 * 4 * 4
    assert sites["blocks.0.mlp"].flops == 2 * rows * 3 * 4 * 4
    assert sites["blocks.0.mlp.1"].flops == 2 * 2 * rows * 3 * 4 * 8
    with pytest.raises(GraphCacheError, match=r"no site blocks\.9\.mlp; it has blocks\.0\.mlp"):
        found.index("blocks.9.mlp")


def described(on: Subject) -> Described:
    """A model of the zoo as profiling sees it from outside."""
    static = on.static()

    def sampler(model: nn.Module, sample: int, steps: int) -> Tensor:
        x = on.latents()
        for step in range(steps):
            x = x - on.case.prediction(model(**on.case.call(static, x, 1 - step / steps))) / steps
        return x

    engine = Engine(on.model, Options(Plan(1), names=Names(on.case.timestep)))
    return describe(engine, Sampling.of(on.model, sampler).first_call(0, 1), None)


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_token_bytes_are_those_of_a_budget_and_none_where_it_is_refused(name: str) -> None:
    on = subject(name)
    program = Program(on.captured, None).prepared()
    budget = Letter("a", "tokens", (("count", 1), ("by", "random"), ("multiple", 1)))
    refused = 0
    for site in described(on).sites:
        if site.kind != "branch":
            continue
        plan = Plan(2, (budget,), (Row(Selector.parse(site.name), "#a"),))
        if site.token_bytes:
            assert site.token_bytes == sum(program.entry_bytes(program.schedule(plan)).values())
        else:
            refused += 1
            with pytest.raises(PlanError, match="no token budget"):
                program.schedule(plan)
    assert (refused > 0) == (name == "sana")


def test_a_range_is_kept_with_every_stream_that_leaves_it() -> None:
    on = subject("sd3")
    found = described(on)
    sites = {site.name: site for site in found.sites}
    nodes, branches = on.captured.step.nodes(), on.captured.step.branches
    bytes_of = {branch.context: value_of(nodes[branch.merge]).nbytes for branch in branches}
    image, text = bytes_of[False], bytes_of[True]
    assert image != text
    assert sites["range(0..0)"].bytes_kept == image + text
    # the last block makes no text
    assert sites["range(0..1)"].bytes_kept == image
    inside = sum(site.flops for site in found.sites if site.name.startswith("transformer_blocks.0."))
    assert inside <= sites["range(0..0)"].flops < found.flops


def test_ranges_that_project_the_stream_are_left_out() -> None:
    class Projected(LinearDiT):
        def __init__(self) -> None:
            super().__init__()
            self.between = nn.Linear(4, 4)

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            gate = torch.cos(self.time(timestep[:, None]) + self.text(text))[:, None]
            x = self.between(self.blocks[0](x, gate))
            return self.blocks[2](self.blocks[1](x, gate), gate)

    found = graphcache.profile(Projected().eval(), [0], steps=2, sampler=Sampler(), probes=1)
    assert {site.kind for site in found.sites} == {"branch", "output"}
    assert len(found.sites) == 7


def test_drift_and_ranking_are_those_of_the_tokens() -> None:
    on = measured("calls")
    drift, ranking = np.zeros((STEPS, 3)), np.zeros(STEPS)
    for sample in on.samples:
        steps = values_by_hand("calls", sample)["blocks.1.mlp"]
        for step in range(1, STEPS):
            for before, now in zip(steps[step - 1], steps[step], strict=True):
                moved, size = (now - before).norm(dim=-1), now.norm(dim=-1)
                drift[step] += (moved.square().mean(0).sqrt() / size.mean()).numpy() / 2
                pairs = zip(before.norm(dim=-1).numpy(), moved.numpy(), strict=True)
                ranking[step] += np.mean([spearman(one, other) for one, other in pairs]) / 2
    np.testing.assert_allclose(on.profile.drift["blocks.1.mlp"], drift[1:].mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(on.profile.ranking["blocks.1.mlp"], ranking, rtol=1e-6, atol=1e-9)


def test_tokens_that_only_some_samples_have_count_for_those() -> None:
    def sampler(model: nn.Module, sample: int, steps: int) -> Tensor:
        return Sampler(tokens=sample)(model, sample, steps)

    few, more, both = (
        profiled(None, samples, sampler=sampler).drift["blocks.0.mlp"] for samples in ((3,), (5,), (3, 5))
    )
    expected = np.concatenate([few, [0, 0]]) / 2 + more / 2
    np.testing.assert_allclose(both, expected, rtol=1e-6)


class ListedDiT(LinearDiT):
    """Takes and gives a list of samples."""

    def forward(self, x: list[Tensor], timestep: Tensor, text: Tensor) -> list[Tensor]:  # type: ignore[override]
        return list(super().forward(torch.stack(x), timestep, text).unbind())


def in_lists(model: nn.Module, sample: int, steps: int) -> Tensor:
    def called(x: Tensor, **rest: Tensor) -> Tensor:
        return torch.stack(model(list(x.unbind()), **rest))

    return Sampler()(called, sample, steps)


def test_latents_may_be_a_list_of_samples() -> None:
    model = ListedDiT(2).eval()
    model.load_state_dict(linear(2).state_dict())
    found, expected = (
        graphcache.profile(one, [5, 8], steps=4, sampler=sampler)
        for one, sampler in ((model, in_lists), (linear(2), Sampler()))
    )
    assert [site.name for site in found.sites] == [site.name for site in expected.sites]
    np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-6)
    np.testing.assert_allclose(found.effects, expected.effects, rtol=1e-4, atol=1e-7)
    plan = graphcache.search(expected, speedup=1.3).plan
    tuned, same = (
        tune(one, plan, [5], [8], sampler=sampler, iterations=2, every=2, rate=0.01)
        for one, sampler in ((model, in_lists), (linear(2), Sampler()))
    )
    assert tuned.before == pytest.approx(same.before, abs=1e-3)
    for step in tuned.curve, same.curve:
        assert step[1].trained != step[0].trained
    assert tuned.curve[1].trained == pytest.approx(same.curve[1].trained, abs=1e-3)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(item)) for item in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_products_of_large_values_are_kept_by_the_sketch() -> None:
    sampler, model = Sampler(tokens=700), linear(1)
    found = graphcache.profile(model, [0], steps=4, sampler=sampler, probes=1)
    values: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, args, result: values.append(result.flatten()))
    with torch.no_grad():
        sampler(model, 0, 4)
    stacked = torch.stack(values).double()
    gram, sketched = (stacked @ stacked.T).numpy(), found.gram[found.index("output")]
    np.testing.assert_allclose(sketched, gram, atol=0.05 * gram.max())
    spread, sketched_spread = (g[0, 0] + g[3, 3] - 2 * g[0, 3] for g in (gram, sketched))
    assert sketched_spread == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", ["little", "enough", "plenty"])
def test_a_sampler_may_update_inputs_and_results_in_place(mode: str | None, level: str) -> None:
    memory = levels(mode)[level]
    samplers = Sampler(mode, in_place=True, fades=True), Sampler(mode, fades=True)
    within, apart = (profiled(mode, samples=(5,), sampler=sampler, memory=memory) for sampler in samplers)
    assert_same_profile(within, apart)


@pytest.mark.few(2)
@pytest.mark.parametrize("mode", MODES)
def test_what_fits_into_memory_is_not_computed_again(mode: str | None) -> None:
    profiled(mode, samples=(5,))  # captures
    profiles, spent = [], []
    for_one_evaluation = 3000 if mode in ("first", "last") else 1500
    at = levels(mode)
    for memory in (at["enough"], at["enough"] + for_one_evaluation, at["plenty"], at["little"]):
        with FlopCounterMode(display=False) as counter:
            profiles.append(profiled(mode, samples=(5,), probes=2, memory=memory))
        spent.append(counter.get_total_flops())
    for found in profiles[1:]:
        assert_same_profile(found, profiles[0])
    evaluations, twice = 6 if mode == "calls" else 3, 2 * profiles[0].flops
    assert [spent[0] - other for other in spent[1:3]] == [twice, evaluations * twice]
    # stretch by stretch: once to keep their inputs and once for gradients
    assert spent[3] - spent[0] == pytest.approx(evaluations * twice, rel=0.5)
    assert spent[3] > spent[0]


def test_what_is_held_is_let_go_in_the_end() -> None:
    kept: list[Tensor] = []

    def keeping(model: nn.Module, sample: int, steps: int) -> Tensor:
        kept.append(Sampler()(model, sample, steps))
        return kept[-1]

    profiled(None, samples=(5,), sampler=keeping)
    nodes, evaluations = [kept[-1].grad_fn], []
    for node in nodes:
        nodes += [other for other, _ in node.next_functions if other is not None]
        evaluations += [node.evaluation] if hasattr(node, "evaluation") else []
    assert len(set(map(id, evaluations))) == 3
    assert not any(evaluation.held for evaluation in evaluations)


def test_autocast_holds_on_the_way_back_too() -> None:
    def cast(model: nn.Module, sample: int, steps: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return Sampler()(model, sample, steps)

    amounts = levels().values()
    *others, held = (profiled(None, samples=(5,), sampler=cast, memory=memory) for memory in amounts)
    for other in others:
        assert_same_profile(other, held)
    assert not np.array_equal(held.gram, profiled(None, samples=(5,)).gram)


def assert_same_profile(one: Profile, other: Profile) -> None:
    """Bit for bit, but for the seconds that sites took."""
    assert [site.name for site in one.sites] == [site.name for site in other.sites]
    for name in ("gram", "effects"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    for name in ("drift", "ranking"):
        assert getattr(one, name).keys() == getattr(other, name).keys()
        for site, table in getattr(one, name).items():
            np.testing.assert_array_equal(table, getattr(other, name)[site], strict=True)
    assert (one.numbers, one.flops, one.calls) == (other.numbers, other.flops, other.calls)


class Reordered(LinearDiT):
    """Its text comes first, and its arguments have names that say nothing."""

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return super().forward(b, c, a)


def test_latents_and_timestep_that_are_not_found_can_be_named() -> None:
    """Profile, search, tuning and comparison are those of the model whose arguments speak for themselves."""
    model, names = Reordered(1).eval(), {"timestep": "c", "latents": "b"}
    model.load_state_dict(linear(1).state_dict())

    def sampler(given: nn.Module, sample: int, steps: int) -> Tensor:
        def call(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return given(text, x, timestep) if isinstance(given, Reordered) else given(x, timestep, text)

        return Sampler()(call, sample, steps)

    found = graphcache.profile(model, [0], steps=4, sampler=sampler, **names)
    assert_same_profile(found, graphcache.profile(linear(1), [0], steps=4, sampler=Sampler()))
    made = graphcache.auto(
        model, [0, 1], steps=4, speedup=1.2, sampler=sampler, iterations=1, backend=None, **names
    )
    rows = compare(model, {"found": made.plan}, [2], steps=4, sampler=sampler, backend=None, **names)
    (expected,) = compare(linear(1), {"found": made.plan}, [2], steps=4, sampler=Sampler(), backend=None)[1:]
    assert rows[1].psnr == expected.psnr


def test_a_sampling_says_once_how_a_model_is_run() -> None:
    given = graphcache.Sampling.of(linear(1), Sampler("first"), conditional="first")
    assert_same_profile(graphcache.profile(given, [5, 8, 2], steps=3, probes=1), profiled())
    made = graphcache.auto(given, [5, 8], steps=3, speedup=1.1, iterations=1, backend=None)
    assert graphcache.restore(made.model) is given.model
    (_, row) = compare(given, {"found": made.plan}, [8], steps=3, backend=None)
    assert row.psnr == pytest.approx(made.held_out, abs=1e-2)
    with pytest.raises(GraphCacheError, match=r"give sampler=, timestep=, latents=.* to Sampling.of"):
        graphcache.profile(given, [5], steps=3, conditional="last")


def test_a_seed_gives_the_same_profile_and_another_one_other_probes() -> None:
    assert_same_profile(profiled(seed=3), profiled(seed=3))
    one, other = profiled(seed=3), profiled(seed=4)
    np.testing.assert_array_equal(one.gram, other.gram)
    assert not np.isclose(one.effects, other.effects)[one.effects != 0].any()


def test_samples_may_be_measured_in_any_order() -> None:
    def reversed_map(measure: Callable[[int], Any], numbers: Sequence[int]) -> Iterable[Any]:
        return [measure(number) for number in reversed(numbers)][::-1]

    assert_same_profile(profiled(run=reversed_map), profiled())


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    profiled(samples=(5,))
    assert torch.equal(torch.get_rng_state(), before)


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 2])
def test_a_profile_that_was_interrupted_goes_on_where_it_stopped(tmp_path: Path, stop: int) -> None:
    path, told = tmp_path / "profile.json", []

    def stopping(done: int, total: int) -> None:
        if done == stop:
            raise _Stopped

    with pytest.raises(_Stopped):
        profiled(path=path, progress=stopping)
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        f".profile.json.part{number}" for number in range(stop)
    ]
    sampler = Sampler("first")
    resumed = profiled(path=path, sampler=sampler, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 3) for done in range(stop, 4)]
    assert len(sampler.directions) == 3 - stop
    assert [item.name for item in tmp_path.iterdir()] == ["profile.json"]
    whole = profiled()
    assert_same_profile(resumed, whole)
    assert_same_profile(load_profile(path), whole)


def test_parts_of_another_task_are_not_taken_up(tmp_path: Path) -> None:
    def stopping(done: int, total: int) -> None:
        if done == 1:
            raise _Stopped

    with pytest.raises(_Stopped):
        profiled(path=tmp_path / "profile.json", progress=stopping)
    sampler = Sampler("first")
    profiled(path=tmp_path / "profile.json", seed=1, sampler=sampler)
    assert len(sampler.directions) == 3


def test_no_gradient_is_left_and_the_model_stays_as_it_is() -> None:
    model = linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graphcache.profile(model, [1], steps=3, sampler=Sampler(), probes=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_frozen_weights_and_a_transformed_model_make_no_difference() -> None:
    plain = profiled(samples=(5,))
    frozen = graphcache.transform(
        linear(1).requires_grad_(False), Plan.parse("plan steps=3 preset=none\n* #..")
    )
    conditional = {"conditional": "first"}
    found = graphcache.profile(frozen, (5,), steps=3, sampler=Sampler("first"), probes=1, **conditional)
    assert_same_profile(found, plain)


def test_weights_are_frozen_within_and_afterwards_as_they_were() -> None:
    class Pipe:
        def __init__(self) -> None:
            self.text_encoder, self.transformer, self.steps = nn.Linear(2, 2), linear(1), 3
            self.transformer.text.requires_grad_(False)

    def traits(pipe: Pipe) -> list[bool]:
        return [p.requires_grad for m in (pipe.text_encoder, pipe.transformer) for p in m.parameters()]

    @with_frozen_weights
    def stopped(pipe: Pipe) -> None:
        assert not any(traits(pipe))
        raise _Stopped

    pipe = Pipe()
    before = traits(pipe)
    with pytest.raises(_Stopped):
        stopped(pipe)
    assert traits(pipe) == before
    assert {True, False} == set(before)


def test_a_sampler_without_gradients_is_looked_through() -> None:
    plain = profiled(samples=(5,), mode=None)
    decorated = torch.no_grad()(lambda model, sample, steps: Sampler()(model, sample, steps))
    assert_same_profile(profiled(samples=(5,), mode=None, sampler=decorated), plain)


def overflowing(model: nn.Module, sample: int, steps: int) -> Tensor:
    return Sampler()(model, sample, steps) * (float("inf") if sample == 8 else 1.0)


def test_a_later_sample_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(GraphCacheError, match="not finite"):
        profiled(None, path=path, sampler=overflowing)
    assert not path.exists()
    found = profiled(None, path=path)
    assert_same_profile(load_profile(path), found)


def test_samples_that_threads_measure_at_once_are_not_mixed_up() -> None:
    with ThreadPoolExecutor(3) as pool:
        assert_same_profile(profiled(run=pool.map), profiled())


def noisy(model: nn.Module, sample: int, steps: int) -> Tensor:
    return Sampler()(model, sample, steps) + 1e-3 * torch.randn(2, 3, 4)


def elsewhere(model: nn.Module, sample: int, steps: int) -> Tensor:
    return Sampler()(linear(1), sample, steps)


def detached(model: nn.Module, sample: int, steps: int) -> Tensor:
    return Sampler()(model, sample, steps).detach()


def rounded(model: nn.Module, sample: int, steps: int) -> Tensor:
    return Sampler()(model, sample, steps).mul(255).to(torch.uint8)


def without_gradients(model: nn.Module, sample: int, steps: int) -> Tensor:
    with torch.no_grad():
        return Sampler()(model, sample, steps)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (noisy, "two runs of one sample differ, because the sampler draws random numbers"),
        (elsewhere, "never called the model it was given"),
        (detached, "does not depend on the model's evaluations through differentiable operations"),
        (rounded, "does not depend on the model's evaluations through differentiable operations"),
        (without_gradients, "does not depend on the model's evaluations through differentiable operations"),
        (None, "give sampler=, a function of"),
    ],
)
def test_samplers_that_cannot_be_followed_are_refused(sampler: Any, message: str) -> None:
    with pytest.raises(GraphCacheError, match=message):
        profiled(samples=(5,), mode=None, sampler=sampler)


@pytest.mark.parametrize("mode", [None, "calls"])
def test_a_half_of_a_batch_that_is_not_doubled_is_refused(mode: str | None) -> None:
    with pytest.raises(GraphCacheError, match=r"conditional='last'.*not the same latents: leave it out"):
        graphcache.profile(linear(), [1], steps=3, sampler=Sampler(mode), conditional="last")


def test_no_samples_are_refused() -> None:
    with pytest.raises(GraphCacheError, match="samples is empty"):
        profiled(samples=())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(GraphCacheError, match="str is neither a module nor a pipeline with a transformer"):
        graphcache.profile("model", [{}], steps=3)


def test_an_unknown_backend_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(GraphCacheError, match=r"backend='indutcor' is nothing that torch\.compile takes"):
        profiled(backend="indutcor", progress=lambda done, total: pytest.fail("it measured"))


def test_weights_made_for_inference_alone_are_left_as_they_are() -> None:
    with torch.inference_mode():
        model = linear(1)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with_frozen_weights(lambda model: None)(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_a_pipelines_sample_is_a_mapping() -> None:
    class Pipeline:
        transformer = linear(1)

    with pytest.raises(GraphCacheError, match="a mapping of its call's arguments, not str"):
        graphcache.profile(Pipeline(), ["a cat"], steps=3)


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "calls"), [("pixart", 1), ("flux", 2)])
def test_a_pipeline_is_its_own_sampler(name: str, calls: int) -> None:
    case = PIPELINES[name]
    pipe = case.make()
    transformer, before = pipe.transformer, case.generate(pipe, 3)
    sample = {**case.arguments(1, True, False), "seed": 0}
    conditional = "last" if calls == 1 else None
    found = graphcache.profile(pipe, [sample], steps=3, probes=1, conditional=conditional)
    assert pipe.transformer is transformer
    assert torch.equal(case.generate(pipe, 3), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in transformer.parameters())
    assert found.provenance.scheduler == type(pipe.scheduler).__name__
    assert found.calls == calls
    assert found.numbers == before[0].numel()
    assert found.sites[-1].kind == "guidance"
    assert np.isfinite(found.effects).all()
    assert (np.abs(found.effects[:, 1:, :2]).max(axis=(1, 2, 3, 4)) > 0).all()


STEPS_OF_DIGITS, LABELS = 8, (3, 8)
"""A generation of two images."""


class Digits:
    """Guided images of labels; `directions` are the gradients that came back to the results."""

    def __init__(self) -> None:
        self.directions: list[Tensor] = []

    def __call__(self, model: nn.Module, sample: Sequence[int], steps: int) -> Tensor:
        # the example's loop without its torch.no_grad
        loop: Any = sample_digits.__wrapped__
        result: Tensor = loop(model, ddim_scheduler(), torch.tensor(sample), steps=steps, seed=1)
        if result.requires_grad:
            result.register_hook(self.directions.append)
        return result


class Replayed:
    """Generations that begin at a later step: what came before is known from a whole run."""

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self.model, self.modules = model, modules
        self.results: list[Any] = []
        self.values: list[list[Tensor]] = [[] for _ in modules]
        self.start = self.calls = 0
        for module, values in zip(modules, self.values, strict=True):
            module.register_forward_hook(lambda module, args, result, values=values: values.append(result))
        self.plain = self.run()
        for module in modules:
            module._forward_hooks.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.start:
            return self.results[self.calls - 1]
        result = self.model(*args, **kwargs)
        if not self.start:
            self.results.append(result)
        return result

    def run(self) -> Tensor:
        self.calls = 0
        with torch.no_grad():
            return Digits()(self, LABELS, STEPS_OF_DIGITS).double()

    def change(self, number: int, step: int) -> Tensor:
        """What becomes of the result where a module's value at one step is that of the step before."""
        self.start = step
        handle = self.modules[number].register_forward_hook(
            lambda module, args, result: self.values[number][step - 1] if self.calls == step + 1 else None
        )
        changed = self.run()
        handle.remove()
        return (changed - self.plain).flatten(1)


def test_estimates_on_a_trained_model_rank_sites_and_steps_as_real_runs_do() -> None:
    model, sampler = load_model(), Digits()
    found = graphcache.profile(
        model, [LABELS], steps=STEPS_OF_DIGITS, sampler=sampler, probes=8, window=1, conditional="first"
    )
    along = torch.stack(sampler.directions).double().flatten(2)
    blocks = [(number, model.transformer_blocks[number]) for number in (0, 3, 7)]
    modules = {f"transformer_blocks.{number}.self": block.attn1 for number, block in blocks}
    modules |= {f"transformer_blocks.{number}.mlp": block.ff for number, block in blocks}
    replayed = Replayed(model, list(modules.values()))
    effects, products, errors = [], [], []
    for number, site in enumerate(modules):
        for step in (2, 4, 7):
            change = replayed.change(number, step)
            table = found.effects[found.index(site), step]
            effects.append(table[1] - table[0])
            products.append((along * change).sum(dim=-1).numpy())
            errors.append(float(change.square().sum()))
    estimated = [float((effect**2).mean(axis=0).sum()) for effect in effects]
    assert spearman(np.array(estimated), np.array(errors)) >= 0.9
    assert spearman(np.stack(effects).flatten(), np.stack(products).flatten()) >= 0.9
