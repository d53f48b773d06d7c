"""Profiles as files: what is written is read again, and nothing else is read as a profile."""

import base64
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from graphcache import GraphCacheError, Plan, load_profile, save_profile
from graphcache.ir.plantext import read_json, write_json
from graphcache.planning.profile import Profile, Provenance, SampleProfile, Site
from graphcache.planning.profile_file import decode, encode, load_part, save_part

PLAN = Plan.parse("""
    plan steps=6 preset=none conditional=first graph=g1 scheduler=DDIMScheduler
    t = taylorseer order=1
    c = tuned compute
    k = tokens 16 by random
    @self         ##.tt#
    range(0..1)   #...#.
    blocks.0.mlp  ##t#ct
      step 4 = 0.9 0.1
    @mlp          #kk#k.
""")


def small_profile(steps: int = 3, seed: int = 0) -> Profile:
    """Two sites, every optional field there, numbers with every bit in use."""
    rng = np.random.default_rng(seed)
    return Profile(
        provenance=Provenance("fp", steps, "ddim", 2, 1, seed, "first", {"torch": "2.11.0"}),
        sites=(Site("block.0.mlp", "branch", 10, 8, 1e-5), Site("output", "output", 20, 4, 0.1 + 0.2)),
        gram=rng.normal(size=(2, steps, steps)),
        effects=rng.normal(size=(2, steps, steps, 1, 2)).astype(np.float32),
        drift={"block.0.mlp": rng.random(4)},
        ranking={"block.0.mlp": rng.random(steps)},
        bands=rng.random((steps, 2)),
        numbers=4,
        flops=31,
        calls=2,
        timings={"plain": 1e-3, "compute": 1.1e-3, "output": 5e-324},
        handovers=tuple(range(1, steps, 2)),
    )


def assert_equal(actual: Any, expected: Any) -> None:
    """Bit for bit, dtypes included."""
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert actual.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name in expected:
            assert_equal(actual[name], expected[name])
    elif isinstance(expected, (Profile, SampleProfile)):
        for item in fields(expected):
            assert_equal(getattr(actual, item.name), getattr(expected, item.name))
    else:
        assert actual == expected


@pytest.mark.parametrize("seed", range(5))
def test_a_profile_is_read_as_it_was_written(seed: int) -> None:
    made = small_profile(1 + seed, seed)
    again = decode(encode(made))
    assert_equal(again, made)
    assert encode(again) == encode(made)


def test_a_large_models_profile_is_a_small_file() -> None:
    """57 blocks at 4,096 tokens and 512 of text, 28 steps, four samples with two probes each."""
    rng, steps, names = np.random.default_rng(0), 28, [f"blocks.{i // 3}.self.{i}" for i in range(171)]
    made = Profile(
        Provenance("m", steps, "Flow", 4, 2, 0),
        tuple(Site(name, "branch") for name in names),
        rng.normal(size=(171, steps, steps)),
        rng.normal(size=(171, steps, 13, 2, 4)).astype(np.float32),
        {name: rng.random(4096 if i % 2 else 512).astype(np.float32) for i, name in enumerate(names)},
        {name: rng.random(steps) for name in names},
        None,
        262_144,
        1,
    )
    data = encode(made)
    assert len(data) < 8e6
    assert_equal(decode(data), made)


def test_profiles_of_the_second_version_are_read() -> None:
    """They were of one model."""

    def older(document: dict[str, Any]) -> None:
        document["version"] = 2
        del document["handovers"]

    assert_equal(decode(edited(older)), replace(small_profile(), handovers=()))


def test_profiles_of_the_first_version_are_read() -> None:
    """They had drift for every step, and looked at all tokens."""
    made = small_profile()
    table = np.random.default_rng(0).random((3, 4))

    def older(document: dict[str, Any]) -> None:
        document["version"] = 1
        document["drift"]["block.0.mlp"] = array(table)
        del document["provenance"]["tokens"], document["handovers"]

    again = decode(edited(older))
    np.testing.assert_array_equal(again.drift["block.0.mlp"], table[1:].mean(axis=0))
    assert again.provenance == made.provenance


def test_extreme_numbers_and_absent_fields_survive(tmp_path: Path) -> None:
    made = small_profile()
    gram = made.gram.copy()
    gram[0, 0] = [5e-324, -0.0, 1.7976931348623157e308]
    changed = {**vars(made), "gram": gram, "bands": None, "drift": {}, "ranking": {}, "timings": {}}
    bare = Profile(**changed)
    save_profile(bare, tmp_path / "profile.json")
    assert_equal(load_profile(tmp_path / "profile.json"), bare)
    assert os.listdir(tmp_path) == ["profile.json"]


def test_what_is_read_may_be_written_to() -> None:
    decode(encode(small_profile())).gram[0] = 1


def edited(change: Callable[[dict[str, Any]], None]) -> bytes:
    document = json.loads(encode(small_profile()))
    change(document)
    return json.dumps(document).encode()


def array(values: Any, kind: str = "f8") -> dict[str, Any]:
    made = np.asarray(values, f"<{kind}")
    return {"kind": kind, "shape": list(made.shape), "data": base64.b64encode(made.tobytes()).decode()}


def setting(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Sets fields; `a__b` is the field b of a."""

    def change(document: dict[str, Any]) -> None:
        for path, value in changes.items():
            *parents, last = path.split("__")
            place: Any = document
            for name in parents:
                place = place[name]
            place[last] = value

    return change


def same_site_twice(document: dict[str, Any]) -> None:
    document["sites"][1]["name"] = document["sites"][0]["name"]


def unknown_kind(document: dict[str, Any]) -> None:
    document["sites"][0]["kind"] = "layer"


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another version": (setting(version=4), "version 4 of the profile format is not known, only 1 to 3"),
    "no version": (lambda d: d.pop("version"), "not a profile in JSON"),
    "an unknown field": (setting(more=1), "unknown field `more`"),
    "an unknown field of a site": (lambda d: d["sites"][0].update(depth=1), "unknown field `depth`"),
    "an unknown field of an array": (setting(gram__order="C"), "unknown field `order`"),
    "an unknown field of the provenance": (setting(provenance__host="a"), "unknown field `host`"),
    "a missing field": (lambda d: d.pop("flops"), "missing required field `flops`"),
    "text for a number": (setting(numbers="4"), "not a profile in JSON"),
    "a number that is not finite": (setting(gram=array(np.full((2, 3, 3), np.nan))), "gram: not all"),
    "an infinite effect": (
        setting(effects=array(np.full((2, 3, 3, 1, 2), np.inf), "f4")),
        "effects: not all numbers are finite",
    ),
    "gram of other steps": (setting(gram=array(np.ones((2, 4, 4)))), r"gram is \(2, 4, 4\)"),
    "gram of other sites": (setting(gram=array(np.ones((1, 3, 3)))), "for 2 sites"),
    "effects of other steps": (setting(effects=array(np.ones((2, 4, 3, 1, 2)))), "effects are"),
    "effects without probes": (setting(effects=array(np.ones((2, 3, 3, 0, 2)))), "effects are"),
    "effects of too few axes": (setting(effects=array(np.ones((2, 3, 3)))), "effects are"),
    "a window beyond the steps": (setting(effects=array(np.ones((2, 3, 4, 1, 2)))), "effects are"),
    "drift by step": (setting(drift={"output": array(np.ones((4, 2)))}), "one number for each token"),
    "ranking of other steps": (setting(ranking={"output": array(np.ones(4))}), "one row for each of 3"),
    "more than all tokens": (setting(provenance__tokens=1.5), "at most 1"),
    "bands of no axes": (setting(bands=array(1.0)), "one row for each of 3"),
    "a shape that its data does not fit": (setting(gram__shape=[2, 3, 4]), "bytes are not"),
    "a negative shape": (setting(gram__shape=[-2, -3, 3]), "sizes of at least 0"),
    "a shape of too many axes": (setting(gram__shape=[1] * 40), "more than a profile holds"),
    "a shape of too many numbers": (setting(gram__shape=[2**40]), "more than a profile holds"),
    "a shape beyond 64 bits": (setting(gram__shape=[2**62, 2**62, 0]), "."),
    "half floats": (setting(gram__kind="f2"), "f4 or f8"),
    "objects": (setting(gram__kind="O"), "f4 or f8"),
    "data that is no base64": (setting(gram__data="****"), "gram: "),
    "data beyond ASCII": (setting(gram__data="ä"), "gram: "),
    "a site twice": (same_site_twice, "a site is there twice"),
    "a kind of site that is none": (unknown_kind, "a site is a branch"),
    "no site": (setting(sites=[]), "for 0 sites"),
    "no step": (setting(provenance__steps=0), "gram is"),
    "no flops": (setting(flops=0), "at least 1"),
    "no time": (setting(timings={"plain": 0.0}), "seconds above 0"),
    "a handover at the first step": (setting(handovers=[0]), "handovers are steps after the first of 3"),
    "a handover behind the last step": (setting(handovers=[1, 3]), "handovers are steps after the first"),
    "handovers out of order": (setting(handovers=[2, 1]), "each once and in their order"),
    "another half": (setting(provenance__conditional="both"), "conditional is first, last or absent"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(GraphCacheError, match=message):
        decode(edited(change))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version":1e999}']
)
def test_what_is_no_document_is_refused(data: bytes) -> None:
    with pytest.raises(GraphCacheError, match="not a profile in JSON"):
        decode(data)


def test_a_file_that_is_refused_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphCacheError, match=r"absent\.json: cannot be read"):
        load_profile(tmp_path / "absent.json")
    (tmp_path / "wrong.json").write_bytes(b"{}")
    with pytest.raises(GraphCacheError, match=r"wrong\.json: not a profile"):
        load_profile(tmp_path / "wrong.json")


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync"])
def test_writing_that_fails_leaves_the_old_file(tmp_path: Path, failing: str) -> None:
    path = tmp_path / "profile.json"
    save_profile(small_profile(), path)
    before = path.read_bytes()
    with (
        mock.patch(failing, side_effect=OSError(28, "No space left on device")),
        pytest.raises(GraphCacheError, match="cannot be written: No space left"),
    ):
        save_profile(small_profile(4), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["profile.json"]
    save_profile(small_profile(4), path)
    assert load_profile(path).steps == 4


def test_writing_into_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphCacheError, match="cannot be written"):
        save_profile(small_profile(), tmp_path / "absent" / "profile.json")


def test_a_part_is_taken_up_under_its_own_key_alone(tmp_path: Path) -> None:
    made = small_profile()
    values = {"output": made.gram[0]}
    part = SampleProfile(
        values, {"output": made.effects[0]}, made.drift, made.ranking, made.bands, 4, 2, made.handovers
    )
    place = tmp_path / ".profile.json.part0"
    assert load_part("key 0", place) is None
    save_part(part, "key 0", place)
    again = load_part("key 0", place)
    assert again is not None
    assert_equal(again, part)
    assert load_part("key 1", place) is None
    whole = place.read_bytes()
    for damaged in (whole[:-1], whole.replace(b"f4", b"f2"), b"", b'{"key":"\xff"}', b"[" * 100_000):
        place.write_bytes(damaged)
        assert load_part("key 0", place) is None


def mutate(count: int, seed: int) -> Counter[str]:
    """Read damaged profiles and plans, in turn, and count how each ended.

    Half are a file with a few bytes changed, inserted, copied or cut off; half are a document with a value
    changed, so that what the arrays and rows say is reached.

    Raises:
        AssertionError: a reader raised something else than a GraphCacheError; the message holds the input.
    """
    rng = np.random.default_rng(seed)
    profile, plan = encode(small_profile()), write_json(PLAN._document())
    sources: list[tuple[str, bytes, Callable[[bytes], Any]]] = [
        ("profile", profile, lambda data: encode(decode(data))),
        ("plan as JSON", plan, lambda data: str(Plan._of(read_json(data)))),
        ("plan as text", str(PLAN).encode(), lambda data: str(Plan.parse(data.decode(errors="replace")))),
    ]
    counts: Counter[str] = Counter()
    for number in range(count):
        name, whole, read = sources[number % len(sources)]
        structured = name != "plan as text" and number % 2
        data = _edited(whole, rng) if structured else _damaged(whole, rng)
        try:
            read(data)
        except GraphCacheError:
            counts[f"{name} refused"] += 1
        except Exception as error:
            raise AssertionError(f"{name}: {data!r}") from error
        else:
            counts[f"{name} read"] += 1
    return counts


def _damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(whole)
    for _ in range(int(rng.integers(1, 4))):
        place, way = int(rng.integers(len(data) + 1)), int(rng.integers(5))
        if way == 0:
            data[place : place + 1] = bytes([int(rng.integers(256))])
        elif way == 1:
            data[place:place] = rng.choice(list(b'0123456789-.eE"{}[]:,# =\n;@')).astype(np.uint8).tobytes()
        elif way == 2:
            start, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 40))
            data[place:place] = data[start : start + length]
        elif way == 3:
            del data[place : place + int(rng.integers(1, 40))]
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


_VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -1.5, 1e308, 1e-320,
    "", "f4", "f8", "#", ".", "##.tt#", "output", "range(0..1)", "tokens", "AAAA", "\ud7ff", [], {}, [1], [0],
    [2, 3, 3], {"a": 1},
)  # fmt: skip


def _edited(whole: bytes, rng: np.random.Generator) -> bytes:
    document = json.loads(whole)
    for _ in range(int(rng.integers(1, 4))):
        places = list(_places(document))
        parent, key = places[int(rng.integers(len(places)))]
        way = int(rng.integers(4))
        if way == 0 and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif way == 1:
            del parent[key]
            if not document:
                break
        elif way == 2 and isinstance(parent[key], (int, float)):
            parent[key] += int(rng.integers(-3, 4))
        else:
            parent[key] = _VALUES[int(rng.integers(len(_VALUES)))]
    return json.dumps(document).encode()


def _places(value: Any) -> Any:
    """Every (container, key) below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def test_damaged_files_are_read_or_refused_and_nothing_else_happens() -> None:
    counts = mutate(4_000, seed=1)
    assert counts.total() == 4_000
    assert all(counts[f"{name} refused"] > 300 for name in ("profile", "plan as JSON", "plan as text"))
    assert counts["profile read"] > 20


def test_every_truncation_is_refused() -> None:
    whole = encode(small_profile(1))
    for length in range(len(whole) - 1):
        with pytest.raises(GraphCacheError):
            decode(whole[:length])
