"""Token budgets: the analysis of the token axis, partial branches, scores, choices."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, fx
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from graphcache import Plan, PlanError, presets, transform
from graphcache.analysis import ops
from graphcache.compiler.program import Program
from graphcache.ir.graph import Branch, is_tensor, value_of
from graphcache.ir.history import History
from graphcache.ir.letter import Letter
from graphcache.ir.schedule import Budget, Selection
from graphcache.passes import scores
from graphcache.runtime import runner
from graphcache.runtime.runner import BranchState, begun, run_step
from graphcache.runtime.selection import SiteTokens, choose
from reference import Subject, assert_same, runner_tensors, subject
from reference_selection import chosen
from strategies import QUICK, plans
from tests.runtime.test_semantics import check_against_reference
from tiny import arguments, tiny
from zoo import CASES

REFUSED = {
    ("mochi", "joint"): "scaled_dot_product_attention.* has a shape that depends on data",
    ("sana", "self"): "aten.matmul.default.* mixes tokens",
    ("sana", "mlp"): "aten.conv2d.default.* mixes tokens",
    ("factorised_dit", "self.spatial"): "attends within groups of tokens",
    ("factorised_dit", "self.temporal"): "attends within groups of tokens",
    ("per_frame_mmdit", "self.temporal"): "attends within groups of tokens",
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_close(actual: Any, expected: Any) -> None:
    """Up to what a product over fewer rows rounds differently, times the feedback of nine steps."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def kinds(on: Subject) -> dict[tuple[str, bool], Branch]:
    """The first branch of each role, of the latents' stream and of the text's."""
    found: dict[tuple[str, bool], Branch] = {}
    for branch in on.captured.step.branches:
        found.setdefault((branch.role, branch.context), branch)
    return found


def run(on: Subject, plan: Plan, tensors: list[list[Tensor]]) -> list[Tensor]:
    """The results of a generation whose steps have these inputs, whatever their timesteps say."""
    program = Program(on.captured, None).prepared()
    state: BranchState = begun((), program, plan, 0, "only")
    results = []
    for step, inputs in enumerate(tensors):
        state.step = step
        results.append(on.case.prediction(run_step(state, inputs)))
    return results


def inputs(on: Subject, t: float = 1.0, seed: int = 0) -> list[Tensor]:
    return runner_tensors(on.model, on.call(on.static(), on.latents(seed), t))


class TestPartialBranches:
    @pytest.mark.few(10)
    @pytest.mark.parametrize("name", CASES)
    def test_chosen_tokens_are_what_they_are_among_all(self, name: str) -> None:
        """With inputs that do not change, a partial branch writes what stands there."""
        on = subject(name)
        given = [inputs(on)] * 3
        for (role, _), branch in kinds(on).items():
            plan = Plan.parse(f"plan steps=3\na = tokens 5 by random multiple=1\n{branch.name} #aa")
            reason = REFUSED.get((name, role))
            if reason is not None:
                with pytest.raises(PlanError, match=f"site {branch.name}: no token budget, since .*{reason}"):
                    run(on, plan, given)
                continue
            whole, *partial = run(on, plan, given)
            for result in partial:
                torch.testing.assert_close(result, whole, rtol=1e-6, atol=1e-6)

    @pytest.mark.few(3)
    @pytest.mark.parametrize(
        "name", ["dit", "pixart", "latte", "cogvideox", "flux", "wan", "functional_mmdit"]
    )
    def test_all_tokens_equal_compute_and_none_equal_reuse(self, name: str) -> None:
        on = subject(name)
        given = [inputs(on, 1 - step / 3, step) for step in range(3)]
        for (role, _), branch in kinds(on).items():
            if (name, role) in REFUSED or role in ("joint", "parallel", "self"):
                continue
            for budget, action in ((10**6, "#"), (0, ".")):
                letter = f"a = tokens {budget} by random multiple=1"
                plans_ = (f"{letter}\n{branch.name} #aa", f"{branch.name} #{action}{action}")
                ours, theirs = (run(on, Plan.parse(f"plan steps=3\n{rows}"), given) for rows in plans_)
                assert_same(ours, theirs)

    @pytest.mark.few(3)
    @pytest.mark.parametrize("name", ["dit", "pixart", "latte", "wan", "allegro", "ltx", "chunked_dit"])
    def test_all_tokens_of_self_attention_equal_compute(self, name: str) -> None:
        on = subject(name)
        given = [inputs(on, 1 - step / 3, step) for step in range(3)]
        letter = "a = tokens 1000000 by random multiple=1"
        ours = run(on, Plan.parse(f"plan steps=3\n{letter}\n@self #aa"), given)
        assert_same(ours, run(on, Plan.parse("plan steps=3\n@self ###"), given))

    @pytest.mark.few(4)
    @pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image", "cogvideox", "hunyuan_video"])
    @pytest.mark.parametrize("rows", ["@joint {0}\n@joint.context {0}\n@parallel {0}", "@joint {0}"])
    def test_all_tokens_of_joint_attention_equal_compute(self, name: str, rows: str) -> None:
        """Also where text is attended to that the plan, or the last block, says nothing of."""
        on = subject(name)
        given = [inputs(on, 1 - step / 3, step) for step in range(3)]
        letter = "a = tokens 1000000 by random multiple=1"
        if not any(branch.role == "parallel" for branch in on.captured.step.branches):
            rows = rows.replace("\n@parallel {0}", "")
        ours = run(on, Plan.parse(f"plan steps=3\n{letter}\n{rows.format('#aa')}"), given)
        assert_same(ours, run(on, Plan.parse(f"plan steps=3\n{rows.format('###')}"), given))


MIXED = {
    "dit": "a = tokens 5 by random multiple=1\nb = tokens .5 by stratified multiple=1\n@self #aa.#a\n"
    "@mlp #bbbb.",
    "pixart": "a = tokens 7 by norm multiple=1\nt = linear weight=exact\n@cross #aa#a.\n"
    "@mlp #a#t.a\n@self ###tt.",
    "latte": "a = tokens 4 by random multiple=1\n@self.spatial #aa#a.\n@cross #.a#aa\n@mlp #aaa#a",
    "cogvideox": "a = tokens 4 by random multiple=1\nb = tokens 2 by norm multiple=1\n@joint #aa#a.\n"
    "@joint.context #aa#.a\n@mlp.context #b.#bb",
    "flux": "a = tokens 4 by random multiple=1\n@joint #a.#aa\n@joint.context #.a#.#\n@parallel #aa##a",
    "sd3": "a = tokens 4 by random multiple=1\nrange(0..0) #.##.#\n@joint #aa#a.\n@mlp #aaaa#",
    "wan": "a = tokens 9 by stratified multiple=1\n@self #aa#a.\n@cross #a.#aa",
    "ltx": "a = tokens 5 by cluster multiple=1 blend=0.25\n@mlp #aa#a.",
    "factorised_dit": "a = tokens 5 by cluster multiple=1 blend=0.5\n@mlp #aa#a.\n@self #..#.#",
    "functional_mmdit": "a = tokens 4 by random multiple=1\n@joint #aa#a.\n@parallel #aa#.a",
    "qwen_image": "a = tokens 4 by random multiple=1\n@joint #aa#a.\n@joint.context #.a#a.",
}


@pytest.mark.few(4)
@pytest.mark.parametrize("name", MIXED)
def test_plans_with_budgets_equal_the_reference(name: str) -> None:
    check_against_reference(subject(name), Plan.parse(f"plan steps=6\n{MIXED[name]}"), assert_close)


@pytest.mark.parametrize("name", ["dit", "pixart", "chunked_dit", "latte"])
def test_random_plans_equal_the_reference(name: str) -> None:
    on = subject(name)

    @QUICK
    @given(plan=plans(selectors=["@self", "@mlp", "@cross", "*", "range(0..1)"], steps=(2, 9), tokens=True))
    def check(plan: Plan) -> None:
        check_against_reference(on, plan, assert_close)

    check()


def letter(text: str) -> Letter:
    return Plan.parse(f"plan steps=1\na = {text}\n* #").letters[0]


def tables(text: str, rows: int = 2, count: int = 16, steps: int = 4, **given: Any) -> list[Tensor]:
    """The places chosen for the steps after one that computed."""
    item = letter(text)
    selection = Selection(History("x"), tuple((step, item) for step in range(1, steps + 1)), steps + 1)
    score = given.pop("score", None)
    scores = [torch.empty(0) if score is None else score]
    (found,) = choose(selection, SiteTokens(rows, count, torch.device("cpu"), **given), 0, [0], scores)
    return [found[step].places for step in range(1, steps + 1)]


class TestChoices:
    @pytest.mark.parametrize(("budget", "bound"), [(4, 4), (5, 4), (7, 3), (16, 1)])
    def test_random_ones_are_all_computed_within_the_bound(self, budget: int, bound: int) -> None:
        places = tables(f"tokens {budget} by random multiple=1")
        for row in range(2):
            for first in range(4 - bound + 1):
                window = torch.cat([table[row] for table in places[first : first + bound]])
                assert set(window.tolist()) == set(range(16))

    @pytest.mark.parametrize("by", ["random", "stratified"])
    def test_they_depend_on_the_seed_and_on_no_other_row(self, by: str) -> None:
        text = f"tokens 5 by {by} multiple=1 seed="
        first = tables(f"{text}3", rows=3)
        assert_same(first, tables(f"{text}3", rows=3))
        assert_same([table[:1] for table in first], tables(f"{text}3", rows=1))
        assert any(not torch.equal(a, b) for a, b in zip(first, tables(f"{text}4", rows=3), strict=True))

    def test_stratified_ones_are_spread_evenly(self) -> None:
        for table in tables("tokens 4 by stratified multiple=1"):
            assert (table // 4).tolist() == [[0, 1, 2, 3]] * 2

    @pytest.mark.parametrize("by", ["random", "stratified", "norm"])
    def test_places_rise_and_are_distinct(self, by: str) -> None:
        for table in tables(f"tokens 7 by {by} multiple=1", score=torch.rand(2, 16)):
            assert table.shape == (2, 7)
            assert bool((table.diff(dim=1) > 0).all())

    def test_the_best_come_first_and_the_stale_follow(self) -> None:
        """Staleness 1 and scores within 0.1: who was computed waits for all others."""
        score = torch.arange(16) / 160
        one, two, *_ = tables("tokens 8 by norm multiple=1 staleness=1.0", score=score.repeat(2, 1))
        assert one[0].tolist() == list(range(8, 16))
        assert two[0].tolist() == list(range(8))
        frozen = tables("tokens 8 by norm multiple=1 staleness=0.0", score=score.repeat(2, 1))
        assert all(torch.equal(table, one) for table in frozen)

    def test_age_counts_in_periods_or_else_in_cycles(self) -> None:
        """Scores differ by 1/160 at least: age 1 of a cycle's 5 steps outweighs that, 1 of 1000 does not."""
        score = (torch.arange(16) / 160).repeat(2, 1)
        text = "tokens 8 by norm multiple=1 staleness=0.25"
        one, two, *_ = cycle = tables(text, score=score)
        assert not torch.equal(one, two)
        assert_same(tables(f"{text} period=5", score=score), cycle)
        assert all(torch.equal(table, one) for table in tables(f"{text} period=1000", score=score))

    def test_scores_of_half_the_rows_serve_both_halves(self) -> None:
        for table in tables("tokens 5 by norm multiple=1", rows=4, score=torch.rand(2, 16)):
            assert_same(table[:2], table[2:])

    def test_a_spread_takes_one_of_each_block_first(self) -> None:
        score = torch.linspace(1, 1.5, 16).repeat(1, 1)
        (places,) = tables("tokens 4 by norm multiple=1 spread=2 bonus=1.0", rows=1, steps=1, score=score)
        assert sorted((p // 8, p % 4 // 2) for p in places[0].tolist()) == [(0, 0), (0, 1), (1, 0), (1, 1)]

    @pytest.mark.parametrize(("count", "grid"), [(15, (1, 3, 5)), (30, (2, 3, 5)), (15, None)])
    def test_a_spread_needs_a_grid(self, count: int, grid: Any) -> None:
        text, score = "tokens 4 by norm multiple=1 spread=2", torch.rand(1, count)
        if grid is None:
            with pytest.raises(PlanError, match="15 tokens are no square; name their frames"):
                tables(text, rows=1, count=count, score=score)
        else:
            assert tables(text, rows=1, count=count, score=score, grid=grid)[0].shape == (1, 4)

    def test_a_cluster_s_token_is_the_one_next_to_its_mean(self) -> None:
        value = torch.randn(2, 16, 4)
        (places,) = tables("tokens 1 by cluster multiple=1", steps=1, score=value)
        apart = (value - value.mean(1, keepdim=True)).norm(dim=2)
        assert_same(places[:, 0], apart.argmin(1))

    def test_clusters_are_those_of_the_reference(self) -> None:
        """Which says in its own words how far k-means gets, and which token wins a tie."""
        value = torch.randn(2, 16, 4)
        selection = Selection(History("x"), ((1, letter("tokens 4 by cluster multiple=1")),), 2)
        tokens = SiteTokens(2, 16, torch.device("cpu"))
        (ours,) = choose(selection, tokens, 0, [0], [value])
        theirs = chosen(selection, tokens, 0, 0, value)
        assert_same([ours[1].places, ours[1].clusters], [theirs[1].places, theirs[1].clusters])

    @pytest.mark.parametrize("by", ["random", "stratified", "norm", "cluster"])
    def test_sites_chosen_together_are_chosen_as_each_alone(self, by: str) -> None:
        item = letter(f"tokens 5 by {by} multiple=1")
        selection, tokens = (
            Selection(History("x"), ((1, item), (2, item)), 3),
            SiteTokens(2, 16, torch.device("cpu")),
        )
        scores = [torch.rand(2, 16, 4) if by == "cluster" else torch.rand(2, 16) for _ in range(3)]
        together = choose(selection, tokens, 0, [4, 7, 9], scores)
        for site, score, found in zip([4, 7, 9], scores, together, strict=True):
            (alone,) = choose(selection, tokens, 0, [site], [score])
            for step in (1, 2):
                assert_same(
                    [found[step].places, found[step].clusters], [alone[step].places, alone[step].clusters]
                )

    @pytest.mark.parametrize(
        ("count", "multiple", "tokens", "budget"),
        [(0.5, 16, 100, 48), (0.01, 16, 100, 16), (0, 16, 100, 0), (1000, 16, 100, 100), (7, 1, 100, 7)],
    )
    def test_budgets(self, count: float, multiple: int, tokens: int, budget: int) -> None:
        assert Budget(count, multiple).among(tokens) == budget


class Seen(fx.Interpreter):
    """Keeps the operands of every call of fused attention."""

    def __init__(self, on: Subject) -> None:
        super().__init__(on.captured.step.module, garbage_collect_values=False)
        self.attention: list[tuple[fx.Node, tuple[Any, ...]]] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.scaled_dot_product_attention.default:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.attention.append((n, (*args[:3], mask)))
        return super().run_node(n)


def naive_map(on: Subject, role: str, tensors: list[Tensor]) -> Tensor:
    """The first such attention's probabilities in full, fp32: (rows, queries, keys), mean of the heads."""
    seen = Seen(on)
    seen.run(*tensors)
    roles = [
        branch.role for branch in on.captured.step.branches if not branch.context and branch.role != "mlp"
    ]
    query, key, _, mask = seen.attention[roles.index(role)][1]
    scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1).mean(1)


def measured(on: Subject, monkeypatch: pytest.MonkeyPatch, rows: str, shared: bool = False) -> list[Tensor]:
    """The scores that a generation's first step hands to the choice, site by site."""
    scores: list[Tensor] = []

    def record(selection: Selection, tokens: SiteTokens, step: int, sites: Any, given: list[Tensor]) -> Any:
        scores.extend(given)
        return choose(selection, tokens, step, sites, given)

    monkeypatch.setattr(runner, "choose", record)
    program = Program(on.captured, None).prepared()
    state = begun((), program, Plan.parse(f"plan steps=2\n{rows}"), 0, "only", shared)
    run_step(state, inputs(on))
    return scores


def test_compiled_code_writes_chosen_tokens_in_place() -> None:
    """Inductor would otherwise copy the whole cached value, write into the copy, and copy it back."""
    plan = Plan.parse("plan steps=2\na = tokens 2 by random multiple=1\n@mlp #a")
    model = transform(tiny(), plan, backend="inductor")
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        model(**arguments())
        _, codes = run_and_get_code(model, **arguments(0.5))
    written = [code for code in codes if "index_put" in code]
    assert written
    assert not any("copy__" in code for code in written)


class TestScores:
    @pytest.mark.parametrize(
        ("name", "role", "site", "tokens"),
        [
            ("dit", "self", "@mlp", slice(None)),
            ("pixart", "self", "@mlp", slice(None)),
            ("wan", "self", "@self", slice(None)),
            ("flux", "parallel", "@parallel", slice(None)),
            ("cogvideox", "joint", "@mlp", slice(6, None)),
            ("sd3", "joint", "@mlp", slice(0, 16)),
        ],
    )
    def test_influence_is_the_attention_received(
        self, name: str, role: str, site: str, tokens: slice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on = subject(name)
        rows = f"a = tokens 4 by influence multiple=1\n{site} #a"
        sums = naive_map(on, role, inputs(on)).sum(1)[:, tokens]
        ours = measured(on, monkeypatch, rows)[0]
        torch.testing.assert_close(ours, sums / sums.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)
        assert_same(ours.topk(4).indices, sums.topk(4).indices)

    def test_influence_in_bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        on = subject("dit", dtype=torch.bfloat16)
        ours = measured(on, monkeypatch, "a = tokens 4 by influence multiple=1\n@mlp[0..0] #a")[0]
        sums = naive_map(on, "self", inputs(on)).sum(1)
        torch.testing.assert_close(ours, sums / sums.norm(dim=1, keepdim=True), rtol=2e-3, atol=2e-3)

    def test_influence_on_a_part_of_the_queries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        on = subject("dit")
        ours = measured(on, monkeypatch, "a = tokens 4 by influence multiple=1 queries=.25\n@mlp[0..0] #a")[0]
        sums = naive_map(on, "self", inputs(on))[:, ::4].sum(1)
        torch.testing.assert_close(ours, sums / sums.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["pixart", "wan", "latte"])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("most_bytes", [scores.MOST_BYTES, 1024])
    def test_entropy_is_that_of_the_mean_map(
        self, name: str, shared: bool, most_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on = subject(name)
        monkeypatch.setattr(scores, "MOST_BYTES", most_bytes)
        mean = naive_map(on, "cross", inputs(on))
        if shared:
            mean = (mean[: len(mean) // 2] + mean[len(mean) // 2 :]) / 2
        expected = 1 - (mean * (mean + 1e-7).log()).sum(-1)
        ours = measured(on, monkeypatch, "a = tokens 4 by entropy multiple=1\n@cross[0..0] #a", shared)[0]
        torch.testing.assert_close(ours, expected / expected.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)

    def test_no_map_of_tokens_by_tokens_is_made(self) -> None:
        on = subject("pixart")
        rows = "a = tokens 4 by influence multiple=1\n@mlp #a"
        program = Program(on.captured, None).prepared()
        phase = program.phase(program.schedule(Plan.parse(f"plan steps=2\n{rows}")), 0)
        plain = program.phase(program.schedule(presets.compute(2)), 0)
        largest = max(value_of(node).numel() for node in plain.step.calls() if is_tensor(node))
        assert largest >= max(value_of(node).numel() for node in phase.step.calls() if is_tensor(node))

    @pytest.mark.parametrize(
        ("name", "rows", "reason"),
        [
            (
                "dit",
                "a = tokens 4 by entropy\n@mlp #a",
                "tokens by entropy need cross-attention in the same block",
            ),
            ("hunyuan_video", "a = tokens 4 by influence\n@mlp #a", "attention under a mask does not score"),
            (
                "dit",
                "a = tokens 4 by random\nb = tokens 4 by norm\n@mlp #ab",
                "token letters by different scores",
            ),
            ("dit", "a = tokens 4 by random\noutput #a", "'a' is a token budget, which branches have"),
        ],
    )
    def test_what_is_refused(self, name: str, rows: str, reason: str) -> None:
        steps = len(rows.rsplit(maxsplit=1)[-1])
        with pytest.raises(PlanError, match=reason):
            Program(subject(name).captured, None).check(Plan.parse(f"plan steps={steps}\n{rows}"))


class TestGraphs:
    @pytest.mark.parametrize("name", ["dit", "pixart", "wan"])
    def test_a_partial_block_has_few_operations(self, name: str) -> None:
        """Attention reused, the MLP partial; the reference implementation needs 46 besides views."""
        program = Program(subject(name).captured, None)
        site = "@mlp"
        rows = f"a = tokens 4 by random multiple=1\n* #.\n{site} #a"
        schedule = program.schedule(Plan.parse(f"plan steps=2\n{rows}"))
        views = ops.VIEWS | ops.SLICES | ops.BROADCASTS
        counts = []
        for plan in (schedule, program.schedule(Plan.parse("plan steps=2\n* #."))):
            step = program.phase(plan, 1).step
            counts.append(sum(node.target not in views for node in step.calls()))
        blocks = sum(branch.role in site for branch in subject(name).captured.step.branches)
        assert (counts[0] - counts[1]) / blocks <= 26

    @pytest.mark.few(1)
    @pytest.mark.parametrize(
        ("by", "backend"),
        [
            ("random", "aot_eager"),
            ("stratified", "aot_eager"),
            ("norm", "aot_eager"),
            ("cluster", "aot_eager"),
            ("influence", "aot_eager"),
            ("norm", "inductor"),
            ("influence", "inductor"),
        ],
    )
    def test_compiled_once_without_a_break(self, by: str, backend: str) -> None:
        on = subject("dit")
        plan = Plan.parse(f"plan steps=6\na = tokens 5 by {by} multiple=1\n@self #..#..\n@mlp #aa#aa")
        counter = CompileCounterWithBackend(backend)
        model = on.transform(plan, backend=counter)
        expected = on.sample(on.transform(plan), 6)
        for _ in range(3):
            results = on.sample(model, 6)
            if by != "cluster":  # whose borders a rounding may move
                assert_close(results, expected)
        assert counter.frame_count == model.summary().branches[0].graphs <= 2

    def test_gradients_pass_through_partial_steps(self) -> None:
        on = subject("dit")
        plan = Plan.parse("plan steps=3\na = tokens 5 by random multiple=1\n@mlp #aa")
        with torch.enable_grad():
            model = on.transform(plan)
            latents = on.latents().requires_grad_()
            total = latents
            for step in range(3):
                total = total - on.case.prediction(model(**on.case.call(on.static(), total, 1 - step / 3)))
            (gradient,) = torch.autograd.grad(total.square().sum(), latents)
        assert bool(gradient.isfinite().all())
        assert float(gradient.norm()) > 0
