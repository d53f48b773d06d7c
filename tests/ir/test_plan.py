import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache import presets, with_corrections
from graphcache.ir import plantext
from graphcache.ir.errors import PlanError
from graphcache.ir.letter import Letter
from graphcache.ir.plan import Plan, Preset, Row
from graphcache.ir.promise import Promise
from graphcache.ir.resolve import resolve
from graphcache.ir.selector import Selector
from strategies import plans

EXAMPLE = """\
plan steps=12 preset=none
t = taylorseer order=2
a = tokens 64 by random multiple=16 halves=shared seed=0
c = tuned compute
f = fitted order=1
@self            ####t.##t.t#
@mlp[0..0.5]     ####ta##atfc
  step 10 = 1.52 -0.52
  step 11 = 0.9
range(0.0..0.5)  #...........
guidance         #####.##.#.#"""

PROMISING = (
    "plan steps=1\npromise mean={mean} worst={worst} data_range=2 samples={samples} results=pt plan=p0"
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
GRIDS = st.text("#.t", min_size=1, max_size=40).map(lambda text: "#" + text[1:])


@dataclass(frozen=True)
class Site:
    name: str
    role: str
    block: int = 0
    depth: float = 0.0
    context: bool = False


SITES = (
    Site("blocks.0.self", "self", 0, 0.0),
    Site("blocks.0.mlp", "mlp", 0, 0.0),
    Site("blocks.0.joint", "joint", 0, 0.0),
    Site("blocks.0.joint.context", "joint", 0, 0.0, True),
    Site("blocks.1.self.temporal", "self.temporal", 1, 0.5),
    Site("blocks.1.mlp.context", "mlp", 1, 0.5, True),
    Site("blocks.2.mlp", "mlp", 2, 1.0),
)


def grid(actions: str) -> Plan:
    return Plan(len(actions), (Letter("t", "newton", (("order", 1),)),), (Row(Selector.parse("*"), actions),))


def matched(selector: str) -> list[str]:
    return [site.name for site in SITES if Selector.parse(selector).matches(site)]


class TestText:
    def test_the_canonical_text_reads_back_and_prints_itself(self) -> None:
        assert str(Plan.parse(EXAMPLE)) == EXAMPLE

    @given(plans(selectors=["@self", "*", "a.*.mlp", "output", "guidance"], tokens=True, values=FLOATS))
    def test_every_plan_survives_text(self, plan: Plan) -> None:
        assert Plan.parse(str(plan)) == plan
        assert hash(Plan.parse(str(plan))) == hash(plan)

    @given(plans(tokens=True, values=FLOATS))
    def test_every_plan_survives_json(self, plan: Plan) -> None:
        document = plantext.read_json(plantext.write_json(plan._document()))
        assert Plan._of(document) == plan

    def test_comments_blank_lines_and_indentation_mean_nothing(self) -> None:
        loose = "\n; why\n   plan   steps=2 ; two\n\n\tt=newton order=1\n  @self #t ; ok\r\n"
        assert str(Plan.parse(loose)) == "plan steps=2 preset=none\nt = newton order=1\n@self  #t"

    def test_a_plan_without_rows_is_its_header(self) -> None:
        assert str(Plan(3)) == "plan steps=3 preset=none"
        assert Plan.parse("plan steps=3") == Plan(3)

    def test_the_header_keeps_the_type_of_every_argument(self) -> None:
        arguments = (("a", 1), ("b", 1.0), ("c", True), ("d", "word"), ("e", -2.5e-07))
        plan = Plan(1, preset=Preset("x", arguments))
        assert str(plan) == "plan steps=1 preset=x a=1 b=1.0 c=true d=word e=-2.5e-07"
        again = Plan.parse(str(plan)).preset
        assert again is not None
        assert [(name, type(value)) for name, value in again.arguments] == [
            (n, type(v)) for n, v in arguments
        ]

    def test_options_with_defaults_are_filled_in(self) -> None:
        assert Letter("h", "hermite", (("order", 2),)).option("sigma") == 0.5
        ramp = Plan.parse("plan steps=1\nl = linear weight=ramp over=20 begin=7").letters[0]
        assert ramp.options == (
            ("weight", "ramp"),
            ("begin", 7.0),
            ("over", 20.0),
            ("gain", 1.0),
            ("floor", 0.0),
        )
        assert Letter("l", "linear") == Letter("l", "linear", (("weight", "exact"),))

    def test_what_a_letter_is(self) -> None:
        forecast, corrected, budget = (Plan.parse(EXAMPLE).letter(symbol) for symbol in "tca")
        assert forecast is not None
        assert corrected is not None
        assert budget is not None
        assert (forecast.is_forecast, forecast.is_compute, forecast.is_tokens, forecast.order) == (
            True,
            False,
            False,
            2,
        )
        assert (corrected.is_forecast, corrected.is_compute, corrected.order) == (False, True, 1)
        assert (budget.is_forecast, budget.is_tokens, budget.order) == (False, True, 0)
        assert Plan.parse(EXAMPLE).letter("#") is None

    def test_a_row_gives_the_coefficients_of_a_step(self) -> None:
        row = Plan.parse(EXAMPLE).rows[1]
        assert (row.listed(10), row.listed(11), row.listed(0)) == ((1.52, -0.52), (0.9,), None)


class TestPromise:
    PROMISE = Promise(57.21, 53.9, 2.0, 3)

    def test_it_is_a_line_of_the_text_and_of_json(self, tmp_path: Path) -> None:
        plan = Plan.parse(EXAMPLE).promising(self.PROMISE)
        assert plan.promise is not None
        line = "promise mean=57.21 worst=53.9 data_range=2.0 samples=3 results=latent plan="
        assert str(plan).splitlines()[1] == line + plan.promise.plan
        assert str(replace(plan, promise=None)) == EXAMPLE
        assert Plan.parse(str(plan)) == plan != Plan.parse(EXAMPLE)
        for name in ("plan.txt", "plan.json"):
            plan.save(tmp_path / name)
            assert Plan.load(tmp_path / name) == plan

    @pytest.mark.parametrize(
        "change",
        [
            lambda plan: replace(plan, rows=plan.rows[1:]),
            lambda plan: replace(plan, conditional="last"),
            lambda plan: replace(plan, graph="m0"),
            lambda plan: plan.resample(20),
            lambda plan: with_corrections(plan, "k"),
            lambda plan: Plan.parse(str(plan).replace("0.9", "0.8")),
            lambda plan: Plan.parse(str(plan).replace("####t.##t.t#", "####t.##t.##")),
        ],
    )
    def test_a_changed_plan_has_none(self, change: Callable[[Plan], Plan]) -> None:
        plan = Plan.parse(EXAMPLE).promising(self.PROMISE)
        changed = change(plan)
        assert changed != plan
        assert changed.promise is None
        assert "promise" not in str(changed)

    def test_the_same_plan_keeps_it_in_another_text(self) -> None:
        plan = Plan.parse(EXAMPLE).promising(self.PROMISE)
        assert Plan.parse("; found\n" + str(plan).replace("  ", "\t")) == plan
        assert replace(plan, rows=list(plan.rows)) == plan

    def test_a_preset_with_a_promise_is_evaluated_anew(self) -> None:
        plan = replace(presets.fora(12), scheduler="DDIMScheduler").promising(self.PROMISE)
        other = presets.resample(plan, 20)
        assert other == replace(presets.fora(20), scheduler="DDIMScheduler")

    def test_decibels_are_rounded_down(self) -> None:
        assert Promise.of([50.119, 40.999], 1.0, "pt") == Promise(45.55, 40.99, 1.0, 2, "pt")
        with pytest.raises(PlanError, match="not finite"):
            Promise.of([50.0, math.nan], 2.0, "pt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan steps=1\npromise mean=1", "line 2: promise: Object missing required field `worst`"),
        ("plan steps=1\npromise mean=1 worst=a", "line 2: promise: Expected `float`"),
        (PROMISING.format(mean=1, worst=2, samples=1), "worst no more than mean"),
        (PROMISING.format(mean="1e999", worst=2, samples=1), "must be decibels"),
        (PROMISING.format(mean=2, worst=1, samples=0), "samples=0 must be a whole number"),
        (
            PROMISING.format(mean=2, worst=1, samples=1) + "\npromise mean=1",
            "line 3: the plan promises twice",
        ),
        ("", "the text is empty"),
        ("; only a comment", "the text is empty"),
        ("grid steps=2", "line 1: expected 'plan steps="),
        ("plan preset=none", "line 1: the header needs steps="),
        ("plan steps=2.0", "line 1: the header needs steps="),
        ("plan steps=true", "line 1: the header needs steps="),
        ("plan steps=0", "steps=0: a plan has 1 to 100000 steps"),
        ("plan steps=100001", "steps=100001: a plan has"),
        ("plan steps=2 steps=3", "line 1: steps= is given twice"),
        ("plan steps=2 fast", "line 1: expected name=value, found 'fast'"),
        ("plan steps=2 preset=4", "line 1: preset=4 is no name"),
        ("plan steps=2 preset=none interval=3", "preset=none takes no arguments, found interval"),
        ("plan steps=2 preset=x a=1e999", "a=inf is no finite number|a=inf"),
        ("plan steps=2 preset=x 1a=1", "'1a' cannot name an argument"),
        ("plan steps=2\n\n@self", "line 3: expected a site and its actions, found '@self'"),
        ("plan steps=2\n@self # #", "line 2: expected a site and its actions"),
        ("plan steps=2\nt =", "line 2: letter 't' has no kind"),
        ("plan steps=2\nt = newton 2", "line 2: expected name=value, found '2'"),
        ("plan steps=2\na = tokens 64", "line 2: letter 'a': write 'a = tokens 64 by random'"),
        ("plan steps=2\nstep 0 = 1.0", "line 2: coefficients are listed before any row"),
        ("plan steps=2\n@self ##\nstep 1 = one", "line 3: 'one' is no finite number"),
        ("plan steps=2\n@self ##\nstep 1 = 1e999", "line 3: '1e999' is no finite number"),
        ("plan steps=2\n# = newton order=1", "'#' cannot be a letter"),
        ("plan steps=2\n. = newton order=1", "'.' cannot be a letter"),
        ("plan steps=2\nt = cubic order=1", "letter 't': unknown kind 'cubic'; kinds are newton"),
        ("plan steps=2\nt = newton", "letter 't': newton needs order="),
        ("plan steps=2\nt = newton order=9", "order=9 is not a whole number from 0 to 8"),
        ("plan steps=2\nt = newton order=1.0", "order=1.0 is not a whole number"),
        ("plan steps=2\nt = newton order=1 sigma=1", "newton takes order, not 'sigma'"),
        ("plan steps=2\nt = hermite order=1 sigma=0", "sigma=0 is not a number above 0"),
        ("plan steps=2\nl = linear weight=half", "weight=half is not a number, exact, paper or ramp"),
        ("plan steps=2\nl = linear weight=exact over=3", "linear takes weight, not 'over'"),
        ("plan steps=2\nl = linear weight=ramp over=3", "linear needs begin="),
        ("plan steps=2\nc = tuned compute order=1", "tuned compute takes no options, not 'order'"),
        ("plan steps=2\na = tokens -1 by random", "count=-1 is not a number of tokens"),
        ("plan steps=2\na = tokens 1.5 by random", "count=1.5 is not a number of tokens"),
        ("plan steps=2\na = tokens 4 by 7", "by=7 is not the name of a score"),
        ("plan steps=1\nt = newton order=1\nt = newton order=2", "letter 't' is defined twice"),
        ("plan steps=3\n@self ##", "row @self has 2 actions, the plan 3 steps"),
        ("plan steps=2\nt = newton order=1\n@self #x", "row @self, step 1: unknown letter 'x'.*: #, ., t"),
        ("plan steps=2\n@self .#", "row @self, step 0: '.' comes before any compute"),
        ("plan steps=2\nt = newton order=1\n* t#", "row *, step 0: 't' comes before any compute"),
        ("plan steps=2\na = tokens 4 by random\n* a#", "row *, step 0: 'a' comes before any compute"),
        ("plan steps=2\nc = tuned compute\n* c#\nstep 0 = 1.0", "step 0: 'c' comes before any compute"),
        ("plan steps=2\nc = tuned compute\n* #c", "step 1: 'c' is tuned compute; list its coefficients"),
        ("plan steps=2\n* ##\nstep 1 = 1.0", "step 1: coefficients are listed, but its action takes none"),
        ("plan steps=2\n* ##\nstep 2 = 1.0", "lists coefficients of step 2, beyond the last step"),
        ("plan steps=2\n* ##\nstep 1 = 1.0\nstep 1 = 1.0", "lists the coefficients of a step twice"),
        ("plan steps=2\nf = fitted order=1\n* #f\nstep 1 =", "0 coefficients are listed; 'f' takes 1 to 2"),
        (
            "plan steps=2\nf = fitted order=1\n* #f\nstep 1 = 1 1",
            "2 coefficients.*1 values are computed by then",
        ),
        (
            "plan steps=3\nf = fitted order=0\n* ##f\nstep 2 = 1 1",
            "2 coefficients are listed; 'f' takes 1 to 1",
        ),
        (
            "plan steps=2\na = tokens 4 by random\nguidance #a",
            "guidance is computed, reused or forecast by its frequencies, and it alone; 'a' is tokens",
        ),
        (
            "plan steps=2\nc = tuned compute\nguidance #c\nstep 1 = 1 0",
            "guidance is computed, reused or forecast",
        ),
        ("plan steps=2\ng = frequency\n@self #g", "by its frequencies, and it alone; 'g' is frequency"),
        ("plan steps=2\nt = newton order=1\nguidance #t", "by its frequencies, and it alone; 't' is newton"),
        ("plan steps=2\ng = frequency weighting=mine", "weighting=mine is not paper or released"),
        ("plan steps=2\ng = frequency low_until=1.5", "low_until=1.5 is not a whole number of steps"),
        ("plan steps=2\ng = frequency divisor=2", "divisor=2 is not a whole number above 2"),
        (
            "plan steps=3\ng = frequency\nh = frequency divisor=9\nguidance #gh",
            "row guidance: its letters split the difference alike; give them one divisor",
        ),
        ("plan steps=2 conditional=middle", "conditional half of a doubled batch is first or last"),
        ("plan steps=2 grid=8x8", "grid=.*8.*: write frames, height and width of the tokens"),
        ("plan steps=2 grid=1xtwox8", "grid=1xtwox8: write frames, height and width"),
        ("plan steps=2 grid=1x0x8", "write frames, height and width"),
        ("plan steps=2\n@slef ##", "unknown role @slef; roles are @self"),
        ("plan steps=2\n@mlp[0.5..0] ##", "depths are fractions from 0 to 1, the smaller one first"),
        ("plan steps=2\n@mlp[0..2] ##", "depths are fractions from 0 to 1"),
        ("plan steps=2\n@mlp[] ##", "is no role: write @self"),
        ("plan steps=2\nrange(1) ##", "is no range: write"),
        ("plan steps=2\nrange(3..1) ##", "is empty: its first block comes after its last"),
        ("plan steps=2\nmlp(1) ##", "'mlp.1.' is no site name"),
    ],
)
def test_refusals_of_text(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message.replace("*,", r"\*,")):
        Plan.parse(text)


def test_values_that_the_text_cannot_hold_are_refused() -> None:
    for value in (float("nan"), float("inf"), "two words", "a;b", "true", "7", "", 10**18):
        with pytest.raises(PlanError, match="preset x: a="):
            Preset("x", (("a", value),))
    with pytest.raises(PlanError, match="cannot name a preset"):
        Preset("none")
    with pytest.raises(PlanError, match="an argument twice"):
        Preset("x", (("a", 1), ("a", 2)))
    with pytest.raises(PlanError, match="'steps' cannot name an argument"):
        Preset("x", (("steps", 1),))
    for symbol in ("", "ab", " ", "\n", ";", "="):
        with pytest.raises(PlanError, match="cannot be a letter"):
            Letter(symbol, "linear")
    row = Row(Selector.parse("*"), "##f", ((2, (float("nan"),)),))
    with pytest.raises(PlanError, match=r"row \*, step 2: coefficients must be finite"):
        Plan(3, (Letter("f", "fitted", (("order", 1),)),), (row,))
    with pytest.raises(PlanError, match="a plan has 1 to"):
        Plan(True)


class TestFiles:
    @pytest.mark.parametrize("name", ["plan.json", "plan.txt", "plan"])
    def test_a_saved_plan_loads(self, tmp_path: Path, name: str) -> None:
        plan = Plan.parse(EXAMPLE)
        plan.save(tmp_path / name)
        assert Plan.load(tmp_path / name) == plan
        assert os.listdir(tmp_path) == [name]

    def test_json_is_told_by_its_content_too(self, tmp_path: Path) -> None:
        Plan.parse(EXAMPLE).save(tmp_path / "plan.json")
        moved = (tmp_path / "plan.json").rename(tmp_path / "plan")
        assert Plan.load(moved) == Plan.parse(EXAMPLE)

    def test_json_names_its_version(self, tmp_path: Path) -> None:
        Plan(2).save(tmp_path / "plan.json")
        content = json.loads((tmp_path / "plan.json").read_text())
        assert content == {
            "version": 1,
            "steps": 2,
            "preset": None,
            "conditional": None,
            "graph": None,
            "scheduler": None,
            "grid": None,
            "letters": [],
            "rows": [],
            "promise": None,
        }

    def test_a_failed_save_leaves_the_old_file_and_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "plan.txt"
        Plan(2).save(path)

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(PlanError, match="cannot be written: No space left"):
            Plan(3).save(path)
        assert Plan.load(path) == Plan(2)
        assert os.listdir(tmp_path) == ["plan.txt"]

    def test_paths_that_cannot_be_used(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match=r"absent: cannot be read: No such file"):
            Plan.load(tmp_path / "absent")
        with pytest.raises(PlanError, match="cannot be read: Is a directory"):
            Plan.load(tmp_path)
        with pytest.raises(PlanError, match="cannot be written: No such file"):
            Plan(1).save(tmp_path / "absent" / "plan.txt")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "the text is empty"),
            (b"\xff\xfe", "not UTF-8 text at byte 0"),
            (b"plan steps=2\n@self", "line 2: expected a site"),
            (b"import os", "line 1: expected 'plan steps="),
            (b"{", "not a plan in JSON: .*byte|not a plan in JSON: Input data was truncated"),
            (b'{"a":' * 100_000, "not a plan in JSON: maximum recursion depth"),
            (b'{"version": 1, "steps": 1' + b"0" * 5000 + b"}", "not a plan in JSON|a plan has 1 to"),
            (b"{}", "missing required field `version`"),
            (b'{"version": 2}', "version 2 of the plan format is not known"),
            (b'{"version": 1}', "missing required field `steps`"),
            (b'{"version": 1, "steps": "2"}', "Expected `int`, got `str` - at `\\$.steps`"),
            (b'{"version": 1, "steps": 2, "hook": 1}', "unknown field `hook`"),
            (b'{"version": 1, "steps": 2, "rows": [{"site": "*"}]}', r"`actions` - at `\$.rows\[0\]`"),
            (b'{"version": 1, "steps": 2, "rows": [{"site": "*", "actions": "# "}]}', "unknown letter ' '"),
            (b'{"version": 1, "steps": 2, "rows": [{"site": "a b", "actions": "##"}]}', "is no site name"),
        ],
    )
    def test_malformed_content(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "bad"
        path.write_bytes(content)
        with pytest.raises(PlanError, match=f"bad: .*({message})"):
            Plan.load(path)

    def test_a_file_that_is_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plantext, "MAX_BYTES", 10)
        (tmp_path / "big").write_text("plan steps=2")
        with pytest.raises(PlanError, match="larger than"):
            Plan.load(tmp_path / "big")


class TestSelectors:
    @pytest.mark.parametrize(
        ("text", "canonical"),
        [
            ("@self", "@self"),
            ("@mlp.context", "@mlp.context"),
            ("@self.temporal[0..0.50]", "@self.temporal[0..0.5]"),
            ("range(0..1)", "range(0..1)"),
            ("range(0..0.5)", "range(0.0..0.5)"),
            ("range(0.0..1)", "range(0.0..1.0)"),
            ("*", "*"),
            ("blocks.?.mlp", "blocks.?.mlp"),
            ("blocks.1@1.self", "blocks.1@1.self"),
            ("guidance", "guidance"),
            ("output", "output"),
        ],
    )
    def test_text_round_trip(self, text: str, canonical: str) -> None:
        assert str(Selector.parse(text)) == canonical
        assert Selector.parse(canonical) == Selector.parse(text)

    def test_blocks_and_depths_are_different_ranges(self) -> None:
        assert Selector.parse("range(0..1)") != Selector.parse("range(0.0..1.0)")

    def test_a_role_covers_its_kinds_and_context(self) -> None:
        assert matched("@self") == ["blocks.0.self", "blocks.1.self.temporal"]
        assert matched("@self.temporal") == ["blocks.1.self.temporal"]
        assert matched("@self.spatial") == []
        assert matched("@joint") == ["blocks.0.joint", "blocks.0.joint.context"]
        assert matched("@joint.context") == ["blocks.0.joint.context"]

    def test_depths_of_a_role_are_inclusive(self) -> None:
        assert matched("@mlp[0..0.5]") == ["blocks.0.mlp", "blocks.1.mlp.context"]
        assert matched("@mlp.context[0.5..1]") == ["blocks.1.mlp.context"]

    def test_globs_and_names(self) -> None:
        assert matched("*") == [site.name for site in SITES]
        assert matched("blocks.?.mlp") == ["blocks.0.mlp", "blocks.2.mlp"]
        assert matched("blocks.[12].mlp") == ["blocks.2.mlp"]
        assert matched("blocks.0.joint") == ["blocks.0.joint"]
        assert matched("output") == matched("guidance") == matched("range(0..1)") == []

    def test_blocks_of_a_range(self) -> None:
        assert Selector.parse("range(1..3)").blocks(4) == range(1, 4)
        assert Selector.parse("range(0.0..0.5)").blocks(28) == range(14)
        assert Selector.parse("range(0.5..1.0)").blocks(28) == range(14, 28)
        assert Selector.parse("range(0.0..1.0)").blocks(1) == range(1)
        with pytest.raises(PlanError, match="ends beyond the last block: the model has blocks 0 to 2"):
            Selector.parse("range(1..3)").blocks(3)
        with pytest.raises(PlanError, match="holds none of the model's 3 blocks"):
            Selector.parse("range(0.1..0.2)").blocks(3)
        with pytest.raises(PlanError, match="@self is not a range"):
            Selector.parse("@self").blocks(3)

    def test_what_a_selector_is(self) -> None:
        kinds = [
            (item.is_role, item.is_range, item.is_output, item.is_guidance)
            for item in map(Selector.parse, ("@self", "range(0..1)", "output", "guidance", "*"))
        ]
        assert kinds == [tuple(i == j for j in range(4)) for i in range(5)]


class TestResolution:
    def test_the_last_matching_row_wins_and_others_compute(self) -> None:
        plan = Plan.parse("plan steps=2\n@mlp #.\nblocks.2.* ##\nblocks.0.* ##\n@self #.")
        found = resolve(plan, SITES, 3)
        chosen = {name: str(row.selector) for name, row in found.branches.items()}
        assert chosen == {
            "blocks.0.self": "@self",
            "blocks.0.mlp": "blocks.0.*",
            "blocks.0.joint": "blocks.0.*",
            "blocks.0.joint.context": "blocks.0.*",
            "blocks.1.self.temporal": "@self",
            "blocks.1.mlp.context": "@mlp",
            "blocks.2.mlp": "blocks.2.*",
        }
        assert (found.ranges, found.output, found.guidance) == ((), None, None)
        assert resolve(Plan.parse("plan steps=1\n@mlp #"), SITES[:1] + SITES[-1:], 3).branches.keys() == {
            "blocks.2.mlp"
        }

    def test_ranges_and_pseudo_sites(self) -> None:
        ranges = "range(0..2) ##\nrange(1..1) ##\nrange(0.0..1.0) #."
        text = f"plan steps=2\n{ranges}\noutput ##\noutput #.\nguidance #."
        plan = Plan.parse(text)
        found = resolve(plan, SITES, 3)
        assert found.ranges == ((plan.rows[1], 1, 1), (plan.rows[2], 0, 2))
        assert (found.output, found.guidance, found.branches) == (plan.rows[4], plan.rows[5], {})

    def test_a_role_row_may_match_nothing(self) -> None:
        plan = Plan.parse("plan steps=1\n@cross #\n@self #")
        assert len(resolve(plan, SITES, 3).branches) == 2

    def test_a_plan_without_rows_computes(self) -> None:
        assert resolve(Plan(3), SITES, 3).branches == {}

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("blocks.0.mpl", "row blocks.0.mpl matches no site; close names: blocks.0.mlp"),
            ("layers.*", "row layers.* matches no site; "),
            ("x", r"row x matches no site; sites of this model: blocks.0.self, .* and 2 more"),
            ("range(0..7)", "ends beyond the last block"),
            (
                "@cross",
                "no row of the plan matches a site: rows @cross; roles of this model: @joint, @mlp, @self",
            ),
        ],
    )
    def test_rows_that_match_nothing(self, row: str, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            resolve(Plan.parse(f"plan steps=1\n{row} #"), SITES, 3)


class TestResample:
    @given(plans(tokens=True))
    def test_the_same_number_of_steps_is_the_same_plan(self, plan: Plan) -> None:
        assert plan.resample(plan.steps) is plan

    @given(GRIDS, st.integers(1, 60))
    def test_any_grid_gives_a_legal_one_of_the_length(self, actions: str, steps: int) -> None:
        plan = grid(actions).resample(steps)
        assert (plan.steps, len(plan.rows[0].actions)) == (steps, steps)
        assert set(plan.rows[0].actions) <= {"#", *actions}

    @given(
        st.text("#.t", min_size=1, max_size=4).map(lambda t: "#" + t), st.integers(2, 9), st.integers(1, 60)
    )
    def test_a_period_is_kept(self, pattern: str, repeats: int, steps: int) -> None:
        expected = (pattern * steps)[:steps]
        assert grid(pattern * repeats).resample(steps).rows[0].actions == expected

    def test_thresholds_scale_and_round_half_up(self) -> None:
        def resampled(actions: str, steps: int) -> str:
            return grid(actions).resample(steps).rows[0].actions

        assert resampled("####.#.#.#.#####", 32) == "########.#.#.#.#.#.#.#.#########"[:32]
        assert resampled("###ttt", 3) == "##t"
        assert resampled("#.........", 4) == "#..."
        assert resampled("###..#..#..#", 24) == "######" + "..#" * 6

    def test_a_ramp_keeps_its_end_points(self) -> None:
        plan = Plan.parse("plan steps=30\nl = linear weight=ramp begin=7 over=20 gain=0.9")
        assert dict(plan.resample(60).letters[0].options) == {
            "weight": "ramp",
            "begin": 14.0,
            "over": 40.0,
            "gain": 0.9,
            "floor": 0.0,
        }

    def test_the_preset_is_dropped_and_rows_keep_their_sites(self) -> None:
        plan = replace(Plan.parse("plan steps=2\n@self #.\nguidance ##"), preset=Preset("x"))
        assert str(plan.resample(3)) == "plan steps=3 preset=none\n@self     ##.\nguidance  ###"

    def test_listed_coefficients_become_lines_and_corrections_plain_computing(self) -> None:
        listed = "f = fitted order=2\nc = tuned compute\n* ##fc\n  step 2 = 1.5 -0.5\n  step 3 = 0.9 0.1"
        plan = Plan.parse(f"plan steps=4 preset=none\n{listed}")
        assert str(plan.resample(8)) == "plan steps=8 preset=none\nf = newton order=1\n*  ####ff##"
        assert plan.resample(4) is plan

    def test_a_plan_names_its_model_and_scheduler(self) -> None:
        text = "plan steps=2 conditional=last graph=mabc scheduler=DDIMScheduler preset=none\n*  #."
        assert str(Plan.parse(text)) == text
        assert Plan.parse(text).resample(4).graph == "mabc"
        with pytest.raises(PlanError, match="graph='a b' is no name"):
            Plan(2, graph="a b")

    def test_a_plan_has_a_step(self) -> None:
        with pytest.raises(PlanError, match="a plan has 1 to"):
            Plan(3).resample(0)
