"""The report's page: what it says, that it is safe and needs nothing else, and how it looks in a browser."""

import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from browser import Browser, browser, chromium
from graphcache import GraphCacheError, Plan, Profile, presets, save_profile
from graphcache.cli.main import app
from graphcache.compiler.program import Program
from graphcache.cost.pricing import Price
from graphcache.ir.graph import storage_bytes, value_of
from graphcache.ir.units import duration, size, work
from graphcache.page import save_charts, write_page
from graphcache.page.charts import CHARACTER, labelled
from graphcache.page.heatmap import heat_map
from graphcache.page.png import encode, measure
from graphcache.page.scales import colour, is_light, linear, logarithmic
from graphcache.page.tokens import token_maps
from graphcache.planning.candidates import Candidate, candidates
from graphcache.planning.comparison import Contender, unbeaten_rows
from graphcache.planning.prediction import predicted
from graphcache.planning.profile import Provenance, Site
from graphcache.planning.site_sensitivity import sensitivity
from graphcache.planning.timeline import HOLD, branches_of, meet
from reference import capture_call, subject
from tiny import arguments, tiny

STEPS, WINDOW, PROBES, SAMPLES, NUMBERS = 8, 4, 2, 3, 16
BRANCHES = tuple(f"blocks.{i}.{role}" for i in range(2) for role in ("self", "mlp"))
SITES = (
    *(Site(name, "branch", 1_000_000, 4096, 1e-3) for name in BRANCHES),
    Site("range(0..1)", "range", 4_000_000, 4096, 4e-3),
    Site("output", "output", 5_000_000, 1024),
    Site("guidance", "guidance", 2_500_000, 512),
)
FORA = presets.fora(STEPS)
RANGE = Plan.parse(f"plan steps={STEPS} preset=none\nn = newton order=1\nrange(0..1)  ##n.#n.#")
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def a_profile(sites: tuple[Site, ...] = SITES, graph: str = "m0123", window: int = WINDOW) -> Profile:
    """Values that move smoothly, so that whatever is made from them is the same on every machine."""
    count, t = len(sites), np.arange(STEPS)
    gram = np.stack([np.cos((t[:, None] - t) * 0.02 * (i + 1)) * 40 for i in range(count)])
    effects = np.zeros((count, STEPS, window + 1, PROBES, SAMPLES), np.float32)
    for place in np.ndindex(effects.shape):
        i, step, gap, probe, sample = place
        if gap <= step:
            effects[place] = (1 + 0.1 * gap * (i + 1)) / (step + 1) * (-1) ** probe * (1 + sample)
    drift = {site.name: _drift(i, 9) for i, site in enumerate(sites[:3])}
    ranking = {name: np.r_[0.0, np.full(STEPS - 1, 0.25)] for name in drift}
    bands = np.stack([np.r_[0.0, t[1:] * 0.01], np.r_[0.0, t[1:] * 0.03]], axis=1)
    made = Provenance(graph, STEPS, "DDIMScheduler", SAMPLES, PROBES, 7, None, {"torch": "2.13.0"})
    return Profile(made, sites, gram, effects, drift, ranking, bands, NUMBERS, 5_000_000)


def _drift(number: int, tokens: int) -> np.ndarray:
    return 0.1 * (number + 1) + 0.01 * np.arange(tokens)


def a_picture(seed: int = 0) -> bytes:
    return encode(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


ROWS = (
    Contender("uncached", "plain", 1.0, None, None, 2.0, 400.0),
    Contender("fora", "preset", 2.5, 24.0, 0.91, 3.3, 160.0),
    Contender("ours", "searched", 2.6, 29.0, 0.96, 2.5, 154.0),
    Contender("4 steps", "fewer steps", 2.0, 22.0, 0.88, None, 200.0),
)


PRICES = (
    Price("fora:8", {"height": 128}, "f32[2,4,128,8]", 8, 5_000_000_000, 0.5, 3 << 20, 4 << 20),
    Price("newton", {"height": 128}, "f32[2,4,128,8]", 8, 4_000_000_000, 0.4, 5 << 20, 6 << 20),
)


def page(path: Path, profile: Profile | None = None, **options: object) -> str:
    """The text of a page with all there is, or with what is given."""
    full = {
        "rows": ROWS,
        "prices": PRICES,
        "pictures": {row.name: a_picture(i) for i, row in enumerate(ROWS)},
        "sample": a_picture(9),
        "title": "A report",
        **options,
    }
    plans = full.pop("plans", {"fora:8": FORA, "newton": RANGE})
    profile = profile or a_profile()
    full.setdefault("candidates", candidates(a_profile()))
    return write_page(path / "page.html", profile, plans, **full).read_text()  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Tags, attributes, and the text that is read: a line a block, of pictures their description."""

    VOID = ("meta", "link", "input", "img", "br")
    BLOCKS = ("p", "h1", "h2", "h3", "tr", "li", "dt", "dd", "figcaption", "summary", "pre", "label", "svg")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.lines: list[str] = [""]
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        self.lines = [line for line in (" ".join(item.split()) for item in self.lines) if line]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in self.BLOCKS and "svg" not in self.open:
            self.lines.append("")
        if tag in ("th", "td"):
            self.lines[-1] += " | " if self.lines[-1] else ""
        if tag in ("br", "span"):
            self.lines[-1] += " "
        told = dict(attrs).get("aria-label") if tag == "svg" else dict(attrs).get("alt")
        if told:
            self.lines += [f"[{told}]", ""]
        if tag == "title":
            self.titles.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in self.BLOCKS and "svg" not in self.open:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles[-1] += data
        elif not {"svg", "style", "title"} & {*self.open}:
            self.lines[-1] += data


def test_what_the_page_says(tmp_path: Path, golden: Callable[..., None]) -> None:
    golden("\n".join(Reader(page(tmp_path)).lines), most=250)


def test_the_same_is_written_again(tmp_path: Path) -> None:
    assert page(tmp_path) == page(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_what_is_not_there_has_no_section(tmp_path: Path) -> None:
    bare = replace(a_profile(), bands=None, drift={}, ranking={})
    text = page(tmp_path, bare, plans={}, rows=(), prices=(), pictures={}, sample=None, candidates=())
    assert re.findall(r'<h2 id="(\w+)"', text) == ["sensitivity", "sites"]
    assert 'class="shows"' not in text


def test_a_profile_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    full = a_profile()
    one = replace(
        full,
        provenance=replace(full.provenance, steps=1),
        gram=full.gram[:, :1, :1],
        effects=full.effects[:, :1, :1],
        bands=full.bands[:1] if full.bands is not None else None,
    )
    assert "nothing to reuse yet" in page(tmp_path, one, plans={"all": Plan(1)}, candidates=())


def test_nothing_in_a_file_becomes_markup(tmp_path: Path) -> None:
    sites = (Site(HOSTILE, "branch", 10, 4096), Site("<script>", "branch", 10, 4096), *SITES)
    profile = a_profile(sites, HOSTILE)
    provenance = replace(profile.provenance, scheduler=HOSTILE, versions={HOSTILE: HOSTILE})
    text = page(
        tmp_path,
        replace(profile, provenance=provenance),
        plans={HOSTILE: FORA, "other": RANGE},
        rows=[replace(row, name=f"{HOSTILE}{row.name}") for row in ROWS],
        prices=[replace(price, plan=HOSTILE, latents=HOSTILE) for price in PRICES],
        pictures={HOSTILE: a_picture()},
        title=HOSTILE,
    )
    read = Reader(text)
    assert read.tags.isdisjoint(("script", "iframe", "object", "base", "form"))
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    assert {value for tag, name, value in read.attributes if (tag, name) == ("img", "alt")} >= {
        f"Samples of {HOSTILE}"
    }
    assert HOSTILE in read.lines[0]
    assert any(HOSTILE in title for title in read.titles)


def test_letters_of_a_plan_become_no_markup(tmp_path: Path) -> None:
    plan = Plan.parse(f"plan steps={STEPS} preset=none\n< = newton order=1\n*  ##<<##<<")
    assert "<<</text>" not in page(tmp_path, plans={"angle": plan})


def test_characters_that_turn_or_hide_text_are_shown(tmp_path: Path) -> None:
    name = "a\u202egnp\x00.self"
    text = page(tmp_path, a_profile((Site(name, "branch", 10, 4096), *SITES[1:])))
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "a�gnp�.self" in text


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    text = page(tmp_path)
    read = Reader(text)
    sources = [value for _, name, value in read.attributes if name in ("src", "href", "srcset", "data")]
    assert sources
    assert all(value.startswith(("data:", "#")) for value in sources)
    assert not re.search(r"https?://|@import|url\((?!#)|<script", text)
    assert "default-src 'none'" in text


def test_every_table_header_has_a_scope_and_every_picture_a_text(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert not re.findall(r"<th(?![^>]*scope=)(?!ead)[^>]*>", text)
    assert not re.findall(r"<img(?![^>]*alt=)[^>]*>", text)
    assert not re.findall(r"<svg(?![^>]*(?:aria-label|aria-hidden|g class))[^>]*>", text)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len({*ids})
    assert {*re.findall(r'href="#([^"]+)"', text)} <= {*ids}


def test_cells_are_the_roots_of_the_steadied_squared_effects(tmp_path: Path) -> None:
    profile = a_profile()
    values = sensitivity(profile)
    probes, samples = profile.effects.shape[-2:]
    for i in range(len(SITES)):
        assert math.isnan(values[i, 0])
        own, moved = np.zeros(STEPS), np.zeros(STEPS)
        for t in range(1, STEPS):
            squares = (profile.effects[i, t, 1].astype(float) - profile.effects[i, t, 0]) ** 2
            own[t] = sum(squares.mean(axis=0))
            gram = profile.gram[i]
            moved[t] = max(0.0, gram[t, t] - 2 * gram[t, t - 1] + gram[t - 1, t - 1])
        for t in range(1, STEPS):
            near = [s for s in range(max(1, t - 2), min(STEPS, t + 3)) if moved[s]]
            likely = moved[t] * np.mean([own[s] / moved[s] for s in near]) if near else 0.0
            weight = probes * samples
            assert values[i, t] == pytest.approx(math.sqrt((weight * own[t] + 4 * likely) / (weight + 4)))
    read = Reader(page(tmp_path, profile))
    expected = [
        f"step {t}, {s.name}: {values[i, t]:.3g}" for i, s in enumerate(SITES) for t in range(1, STEPS)
    ]
    cells = [title for title in read.titles if title.startswith("step ") and "yet" not in title]
    assert cells == expected


def test_light_cells_are_the_sensitive_ones() -> None:
    cells = heat_map(a_profile(), []).cells
    values = sensitivity(a_profile()).ravel()
    known = [(value, cell) for value, cell in zip(values, cells, strict=True) if cell.colour]
    assert [cell.colour for value, cell in zip(values, cells, strict=True) if math.isnan(value)] == [None] * 7
    assert max(known, key=lambda pair: pair[0])[1].colour == "#fde725"
    assert min(known, key=lambda pair: pair[0])[1].colour == "#440154"


def test_marks_are_drawn_for_every_action() -> None:
    timeline = meet("range", RANGE, a_profile())
    assert timeline.symbols["range(0..1)"] == "##n.#n.#"
    assert timeline.symbols["blocks.0.mlp"] == f"##{HOLD * 2}#{HOLD * 2}#"
    assert "output" not in timeline.symbols
    (black, white) = heat_map(a_profile(), [timeline]).plans[0]
    assert len(black.letters) + len(white.letters) == 2
    assert (black.squares + white.squares).count("z") == 4 * 5
    assert (black.dots + white.dots).count("M") == 2
    assert (black.dashes + white.dashes).count("M") == 4 * 4


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_branches_are_read_off_the_names_of_sites(name: str) -> None:
    step = subject(name).captured.step
    sites = tuple(Site(branch.name, "branch", 10, 10) for branch in step.branches)
    found = [(b.name, b.role, b.context, b.block, b.depth) for b in branches_of(a_profile(sites))]
    assert found == [(b.name, b.role, b.context, b.block, b.depth) for b in step.branches]


def test_fused_branches_are_taken_apart_for_plans_that_do_so() -> None:
    sites = (Site("single.0.parallel", "branch", 10, 100), Site("single.1.parallel", "branch", 10, 100))
    plan = Plan.parse(f"plan steps={STEPS} preset=none\n@parallel.mlp  #...#...")
    timeline = meet("split", plan, a_profile(sites))
    assert timeline.held == (200, 200, 200, 0) * 2
    assert "single.1.parallel.mlp" in timeline.unknown


@pytest.mark.parametrize("plan", [FORA, presets.taylorseer(STEPS), RANGE, presets.hicache(STEPS, interval=4)])
def test_held_bytes_are_those_of_the_captured_model(plan: Plan) -> None:
    captured = capture_call(tiny(2), arguments(), "timestep")
    program, nodes = Program(captured, None), captured.step.nodes()
    sites = tuple(
        Site(b.name, "branch", 10, storage_bytes(value_of(nodes[b.value]))) for b in captured.step.branches
    )
    timeline, schedule = meet("plan", plan, a_profile(sites)), program.schedule(plan)
    sizes = program.entry_bytes(schedule)
    assert timeline.held == tuple(schedule.held(step, sizes) for step in range(STEPS))
    assert timeline.peak == schedule.peak(sizes)


def test_held_bytes_of_a_reused_site_are_one_value_until_its_last_use(tmp_path: Path) -> None:
    timeline = meet("fora", FORA, a_profile())
    assert timeline.held == (16384, 16384, 0, 16384, 16384, 0, 16384, 0)
    assert timeline.peak == 16384
    assert "fora:8 holds between 0 B and 16 KiB after a step" in page(tmp_path)


def test_guidance_halves_what_a_doubled_batch_keeps() -> None:
    rows = "blocks.0.self  #.#.#.#.\nguidance       ##..##.."
    plan = Plan.parse(f"plan steps={STEPS} conditional=last preset=none\n{rows}")
    timeline = meet("guided", plan, a_profile())
    # at step 0 both halves are read at the next; at steps 1 and 5 the difference alone is
    assert timeline.held[0] == 2 * 2048
    assert timeline.held[1] == 512
    assert timeline.symbols["guidance"] == "##..##.."


def test_two_calls_hold_twice_as_much() -> None:
    twice = replace(a_profile(), calls=2)
    assert meet("fora", FORA, twice).held == tuple(2 * n for n in meet("fora", FORA, a_profile()).held)
    plan = Plan.parse(f"plan steps={STEPS} preset=none\nguidance  #.#.#.#.")
    assert meet("guided", plan, twice).held == (1024, 0) * 4


def test_a_packed_history_is_three_quarters() -> None:
    plan = Plan.parse(f"plan steps={STEPS} preset=none\nl = linear8 weight=0.5\nblocks.0.mlp  ##ll##ll")
    assert max(meet("packed", plan, a_profile()).held) == 3072


FAMILIES = {"branches", "branches but mlp", "branches but self", "range(0..1)", "output", "guidance"}


def test_plans_are_promised_what_a_search_promises() -> None:
    profile = a_profile(window=STEPS - 1)
    known = [item for item in candidates(profile) if item.plan.letters[:1] == () or _entries(item) == 2]
    assert {item.family for item in known} == FAMILIES
    for item in known:
        found = predicted(meet("plan", item.plan, profile))
        assert found is not None
        assert found.computed == item.computed
        assert found.speedup == pytest.approx(item.speedup)
        assert found.error == pytest.approx(item.error, rel=1e-6, abs=1e-12)


def _entries(item: Candidate) -> int:
    return item.plan.letters[0].order + 1


def test_what_a_profile_cannot_tell_is_not_promised(tmp_path: Path) -> None:
    beyond = Plan.parse(f"plan steps={STEPS} preset=none\noutput  #......#")
    tokens = Plan.parse(f"plan steps={STEPS} preset=none\na = tokens 4 by random\n@mlp  #aaa#aaa")
    for plan in (beyond, tokens):
        assert predicted(meet("plan", plan, a_profile())) is None
    assert "<td>—</td>" in page(tmp_path, plans={"beyond": beyond})


def test_a_plan_that_computes_all_is_as_fast_and_without_error() -> None:
    found = predicted(meet("all", Plan(STEPS), a_profile()))
    assert found is not None
    assert (found.speedup, found.error, len(found.computed)) == (1.0, 0.0, STEPS)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (presets.fora(12), "plan mine has 12 steps and the profile 8"),
        (replace(FORA, graph="mffff"), "plan mine is for model mffff and the profile of m0123"),
        (
            Plan.parse("plan steps=8 preset=none\nlayers.3.mlp  #.#.#.#."),
            "plan mine does not fit the profile: row layers.3.mlp matches no site",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path: Path, plan: Plan, message: str) -> None:
    with pytest.raises(GraphCacheError, match=re.escape(message)):
        page(tmp_path, plans={"mine": plan})
    assert not (tmp_path / "page.html").exists()


def test_other_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GraphCacheError, match="picture fora: neither PNG nor GIF"):
        page(tmp_path, pictures={"fora": b"<svg onload=alert(1)>"})
    with pytest.raises(GraphCacheError, match="row x: kind='mine'; kinds are preset, searched"):
        Contender("x", "mine", 1.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(GraphCacheError, match=r"missing.page\.html: cannot be written"):
        page(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(GraphCacheError, match="file: cannot be made a folder"):
        save_charts(tmp_path / "file", a_profile(), {})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GraphCacheError, match=re.escape("pip install graphcache-dit[report]")):
        save_charts(tmp_path, a_profile(), {})


def test_a_missing_template_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphcache.page import page as module

    module._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(GraphCacheError, match=r"a report as HTML needs jinja2; install it with: pip install"):
        page(tmp_path)


def test_token_maps_are_of_images_alone() -> None:
    context = Site("blocks.1.mlp.context", "branch", 10, 10)
    profile = a_profile((*SITES[:2], context))
    odd = {**profile.drift, SITES[1].name: _drift(1, 8)}
    (found,) = token_maps(replace(profile, drift=odd))
    drift = odd[SITES[0].name]
    assert (found.site, found.side, found.rank) == (SITES[0].name, 3, 0.25)
    assert (found.low, found.high) == (drift.min(), drift.max())
    assert found.spread == pytest.approx(np.percentile(drift, 95) / np.percentile(drift, 5))


def test_pictures_know_their_size() -> None:
    assert measure(a_picture(), "x") == ("image/png", 32, 32)
    assert measure(b"GIF89a\x05\x00\x07\x00", "x") == ("image/gif", 5, 7)


def test_the_front_is_what_none_beats() -> None:
    assert [row.name for row in unbeaten_rows(ROWS)] == ["ours"]
    slow = Contender("slow", "preset", 1.2, 40.0)
    assert [row.name for row in unbeaten_rows([*ROWS, slow])] == ["ours", "slow"]


def test_labels_hide_nothing() -> None:
    places = [(200.0 + 3 * i, 150.0 + 2 * i) for i in range(12)]
    found = labelled([(place, "a label", 0, "") for place in places])
    boxes = [(p.at[0], p.at[1] - 11, p.at[0] + 7 * CHARACTER, p.at[1] + 3) for p in found if p.label]
    assert len(boxes) >= 2
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for x, y in places)


def test_scales() -> None:
    axis = linear([1.0, 2.6], 0.0, 100.0)
    assert axis.ticks == (1.0, 1.5, 2.0, 2.5, 3.0)
    assert axis(2.0) == pytest.approx(50.0)
    assert linear([3.0, 3.0], 0, 1).ticks[0] < 3.0 < linear([3.0, 3.0], 0, 1).ticks[-1]
    assert logarithmic([0.001, 1.0], 0.0, 3.0)(0.01) == pytest.approx(1.0)
    assert colour(0.0) == (0x44, 0x01, 0x54)
    assert [is_light(colour(share)) for share in (0, 0.2, 0.8, 1)] == [False, False, True, True]


def test_units() -> None:
    assert [size(n) for n in (0, 1000, 1023, 1024, 2_105_344, 5 * 2**40)] == [
        "0 B", "1000 B", "1023 B", "1 KiB", "2.01 MiB", "5120 GiB",
    ]  # fmt: skip
    assert [work(n) for n in (12, 85_065_728, 4e13)] == ["12 FLOPs", "85.1 MFLOPs", "40 TFLOPs"]
    assert [duration(s) for s in (0, 2e-5, 0.0034, 2)] == ["—", "20 µs", "3.4 ms", "2 s"]


def test_charts_are_written_as_pictures(tmp_path: Path) -> None:
    profile = a_profile((Site("a$b$", "branch", 10, 10), *SITES))
    plans = {"$fora$": FORA}
    paths = save_charts(tmp_path / "new", profile, plans, rows=ROWS, candidates=candidates(profile))
    assert [path.name for path in paths] == ["sensitivity.png", "measured.png", "predicted.png"]
    for path in paths:
        kind, width, height = measure(path.read_bytes(), path.name)
        assert kind == "image/png"
        assert min(width, height) > 300
    assert [path.name for path in save_charts(tmp_path, a_profile(), {})] == ["sensitivity.png"]


def test_the_command_writes_page_and_charts(tmp_path: Path) -> None:
    save_profile(a_profile(), tmp_path / "profile.json")
    RANGE.save(tmp_path / "plan.txt")
    plans = ["--plan", str(tmp_path / "plan.txt"), "--plan", "fora"]
    options = ["--output", str(tmp_path / "r.html"), "--charts", str(tmp_path / "charts")]
    options += ["--prices", str(tmp_path / "prices.json")]
    (tmp_path / "prices.json").write_text(json.dumps([asdict(price) for price in PRICES]))
    result = CliRunner().invoke(app, ["report", str(tmp_path / "profile.json"), *plans, *options])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "r.html").read_text()
    assert "<h1>profile.json</h1>" in text
    assert "plan steps=8 preset=fora interval=3" in text
    assert "→ newton" in text
    assert (tmp_path / "charts" / "predicted.png").exists()


needs_chromium = pytest.mark.skipif(chromium() is None, reason="no Chromium on the path")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def shown(tab: Browser, tmp_path: Path) -> Callable[[int, bool], Browser]:
    """Opens the full page, with a hostile site among the others, at a width, light or dark."""
    sites = (Site(HOSTILE * 3, "branch", 10, 4096), *SITES)
    page(tmp_path, a_profile(sites))

    def show(width: int, dark: bool) -> Browser:
        tab.errors.clear()
        tab.show(tmp_path / "page.html", width, dark)
        return tab

    return show


CONTRAST = """
(() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = parts(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!text || node.closest(".marks, title")) continue;
    const style = getComputedStyle(node);
    const ink = parts(node.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${node.tagName} ${node.textContent}`.slice(0, 60));
  }
  return poor;
})()
"""


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_in_a_browser(shown: Callable[[int, bool], Browser], width: int, dark: bool) -> None:
    open_page = shown(width, dark)
    assert open_page.ask("document.documentElement.scrollWidth") == width
    assert open_page.ask("document.body.scrollWidth") <= width
    assert open_page.ask(CONTRAST) == []
    pixels = _pixels(open_page.picture())
    assert pixels.shape[1] == width
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert bool(np.median(pixels) < 60) is dark
    assert open_page.errors == []


@needs_chromium
def test_a_plan_is_chosen_and_wide_maps_scroll_by_themselves(shown: Callable[[int, bool], Browser]) -> None:
    open_page = shown(360, False)
    visible = "[...document.querySelectorAll('.layer')].map((n) => getComputedStyle(n).display)"
    assert open_page.ask(visible) == ["inline", "none"]
    open_page.ask("document.getElementById('show-1').click()")
    assert open_page.ask(visible) == ["none", "inline"]
    open_page.ask("document.querySelector('.map .scroll svg').setAttribute('width', 2000)")
    assert open_page.ask("document.querySelector('.map .scroll').scrollWidth") >= 2000
    assert open_page.ask("document.documentElement.scrollWidth") == 360


def _pixels(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
