"""A plan as text, as JSON and as a file: syntax only, what a plan may say is checked by `Plan`."""

import math
import os
import re
import secrets
from pathlib import Path
from typing import TypeGuard, TypeVar

import msgspec

from graphcache.ir.errors import GraphCacheError, PlanError

VERSION = 1
MAX_BYTES = 64 * 2**20

_HEADER_WORDS = ("conditional", "graph", "scheduler")

_INTEGER = re.compile(r"[+-]?\d{1,18}")
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_LISTED = re.compile(r"step\s+(\d{1,18})\s*=(.*)")
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_LETTER = re.compile(r"(\S)\s*=\s*(.*)")


_Row = TypeVar("_Row")


class LetterLine(msgspec.Struct, forbid_unknown_fields=True):
    """`t = taylorseer order=2`"""

    symbol: str
    kind: str
    options: dict[str, int | float | str] = {}


class CoefficientLine(msgspec.Struct, forbid_unknown_fields=True):
    """`step 4 = 1.52 -0.52`, newest history entry first."""

    step: int
    values: list[float]


class RowLine(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """`@self  ####t.##`"""

    site: str
    actions: str
    coefficients: list[CoefficientLine] = []


class PresetLine(msgspec.Struct, forbid_unknown_fields=True):
    """`preset=fora interval=3` of the header."""

    name: str
    arguments: dict[str, bool | int | float | str] = {}


class PromiseLine(msgspec.Struct, forbid_unknown_fields=True):
    """`promise mean=57.2 worst=53.9 …`, see `Promise`."""

    mean: float
    worst: float
    data_range: float
    samples: int
    results: str
    plan: str


class PlanDocument(msgspec.Struct, forbid_unknown_fields=True):
    """What text and JSON have in common."""

    version: int
    steps: int
    preset: PresetLine | None = None
    conditional: str | None = None
    graph: str | None = None
    scheduler: str | None = None
    grid: list[int] | None = None
    letters: list[LetterLine] = []
    rows: list[RowLine] = []
    promise: PromiseLine | None = None


class _Versioned(msgspec.Struct):
    version: int


def is_number(value: object) -> TypeGuard[int | float]:
    """A number that the text can hold: finite and, when whole, of at most 18 digits."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 10**18
    return isinstance(value, float) and math.isfinite(value)


def is_word(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def parse_value(text: str) -> bool | int | float | str:
    """A word of the text as bool, int, float or str."""
    if text in ("true", "false"):
        return text == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def print_value(value: object) -> str:
    """The word that `parse_value` reads as this value; floats keep every bit."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_text(text: str) -> PlanDocument:
    """The lines of a plan's text; PlanError names the line that is wrong."""
    lines = [(number, line.split(";")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise PlanError("the text is empty; a plan starts with a line such as 'plan steps=12 preset=none'")
    document = PlanDocument(VERSION, 0)
    for index, (number, line) in enumerate(lines):
        try:
            (_read_line if index else _read_header)(line, document)
        except PlanError as error:
            raise PlanError(f"line {number}: {error}") from None
    return document


def _read_header(line: str, document: PlanDocument) -> None:
    word, *rest = line.split()
    if word != "plan":
        raise PlanError(f"expected 'plan steps=… preset=…', found {line[:60]!r}")
    fields = _fields(rest)
    steps, name = fields.pop("steps", None), fields.pop("preset", "none")
    words = {name: fields.pop(name, None) for name in _HEADER_WORDS}
    grid = fields.pop("grid", None)
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise PlanError("the header needs steps= with a whole number")
    if not is_word(name):
        raise PlanError(f"preset={name} is no name")
    if name == "none" and fields:
        raise PlanError(f"preset=none takes no arguments, found {', '.join(fields)}")
    document.steps = steps
    for field, value in words.items():
        setattr(document, field, None if value is None else print_value(value))
    document.grid = None if grid is None else _read_grid(grid)
    document.preset = None if name == "none" else PresetLine(name, fields)


def _read_grid(value: object) -> list[int]:
    sizes = str(value).split("x")
    if not all(map(_INTEGER.fullmatch, sizes)):
        raise PlanError(f"grid={value}: write frames, height and width of the tokens, as in grid=1x64x64")
    return [int(size) for size in sizes]


def _read_line(line: str, document: PlanDocument) -> None:
    words = line.split()
    if words[0] == "promise" and "=" in line:
        if document.promise is not None:
            raise PlanError("the plan promises twice")
        document.promise = _read_promise(words[1:])
    elif listed := _LISTED.fullmatch(line):
        if not document.rows:
            raise PlanError("coefficients are listed before any row")
        line_of_step = CoefficientLine(int(listed[1]), _numbers(listed[2].split()))
        document.rows[-1].coefficients.append(line_of_step)
    elif letter := _LETTER.fullmatch(line):
        kind, options = _read_letter(letter[1], letter[2].split())
        document.letters.append(LetterLine(letter[1], kind, options))
    else:
        if len(words) != 2:
            raise PlanError(f"expected a site and its actions, found {line[:60]!r}")
        document.rows.append(RowLine(words[0], words[1]))


def _read_promise(words: list[str]) -> PromiseLine:
    try:
        return msgspec.convert(_fields(words), PromiseLine)
    except msgspec.ValidationError as error:
        raise PlanError(f"promise: {error}") from None


def _read_letter(symbol: str, words: list[str]) -> tuple[str, dict[str, int | float | str]]:
    if not words:
        raise PlanError(f"letter {symbol!r} has no kind; write '{symbol} = newton order=2'")
    kind, rest = words[0], words[1:]
    if kind == "tokens":
        if len(rest) < 3 or rest[1] != "by":
            raise PlanError(f"letter {symbol!r}: write '{symbol} = tokens 64 by random'")
        rest = [f"count={rest[0]}", f"by={rest[2]}", *rest[3:]]
    if rest[:1] == ["compute"]:
        kind, rest = f"{kind} compute", rest[1:]
    return kind, dict(_fields(rest))


def _fields(words: list[str]) -> dict[str, bool | int | float | str]:
    fields: dict[str, bool | int | float | str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise PlanError(f"expected name=value, found {word[:60]!r}")
        if name in fields:
            raise PlanError(f"{name}= is given twice")
        fields[name] = parse_value(value)
    return fields


def _numbers(words: list[str]) -> list[float]:
    for word in words:
        if not _FLOAT.fullmatch(word) or not math.isfinite(float(word)):
            raise PlanError(f"{word[:60]!r} is no finite number")
    return [float(word) for word in words]


def write_text(document: PlanDocument) -> str:
    """The canonical text: aligned, nothing left out, no newline at the end."""
    preset = document.preset or PresetLine("none")
    header = [f"plan steps={document.steps}", f"preset={preset.name}", *_words(preset.arguments)]
    for name in reversed(_HEADER_WORDS):
        if getattr(document, name) is not None:
            header.insert(1, f"{name}={getattr(document, name)}")
    if document.grid is not None:
        header.insert(1, f"grid={'x'.join(map(str, document.grid))}")
    lines = [" ".join(header)]
    if document.promise is not None:
        lines.append(" ".join(["promise", *_words(msgspec.structs.asdict(document.promise))]))
    lines += [_letter_text(letter) for letter in document.letters]
    width = max((len(row.site) for row in document.rows), default=0)
    for row in document.rows:
        lines.append(f"{row.site:<{width}}  {row.actions}")
        for line in row.coefficients:
            lines.append(f"  step {line.step} = {' '.join(map(repr, line.values))}")
    return "\n".join(lines)


def _letter_text(letter: LetterLine) -> str:
    if letter.kind == "tokens":
        others = {name: value for name, value in letter.options.items() if name not in ("count", "by")}
        budget = f"tokens {letter.options['count']} by {letter.options['by']}"
        return " ".join([f"{letter.symbol} = {budget}", *_words(others)])
    return " ".join([f"{letter.symbol} = {letter.kind}", *_words(letter.options)])


def _words(fields: dict[str, bool | int | float | str] | dict[str, int | float | str]) -> list[str]:
    return [f"{name}={print_value(value)}" for name, value in fields.items()]


def read_json(data: bytes) -> PlanDocument:
    """Strict: unknown fields, other types and other versions are refused, with their place."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != VERSION:
            raise PlanError(f"version {version} of the plan format is not known, only version {VERSION}")
        return msgspec.json.decode(data, type=PlanDocument)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise PlanError(f"not a plan in JSON: {error}") from None


def write_json(document: PlanDocument) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def read_bytes(path: str | os.PathLike[str], most: int | None = None, what: str = "plan") -> bytes:
    """A file's content, of a size that a plan or something else can have."""
    most = MAX_BYTES if most is None else most
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise PlanError(f"cannot be read: {error.strerror}") from error
    if len(data) > most:
        raise PlanError(f"larger than {most >> 20} MiB; this is no {what}")
    return data


def read_rows(path: str | os.PathLike[str], kind: type[_Row], what: str) -> tuple[_Row, ...]:
    """A list of one kind of dataclass, from a file in JSON.

    Raises:
        GraphCacheError: the file holds something else than `what` is in.
    """
    try:
        return tuple(msgspec.json.decode(read_bytes(path), type=list[kind]))  # type: ignore[valid-type]
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise GraphCacheError(f"{os.fspath(path)}: no {what} in JSON: {error}") from None


def load(path: str | os.PathLike[str]) -> PlanDocument:
    """A file's document; JSON when the suffix is `.json` or the content starts with a brace."""
    data = read_bytes(path)
    if Path(path).suffix == ".json" or data.lstrip().startswith(b"{"):
        return read_json(data)
    try:
        return read_text(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PlanError(f"not UTF-8 text at byte {error.start}") from None


def save(document: PlanDocument, path: str | os.PathLike[str]) -> None:
    """Writes text, or JSON where the suffix says so; the file is replaced whole or not at all."""
    as_json = Path(path).suffix == ".json"
    write_bytes(write_json(document) if as_json else (write_text(document) + "\n").encode(), path)


def write_bytes(data: bytes, path: str | os.PathLike[str]) -> None:
    """Writes a temporary file beside the path and moves it there."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise PlanError(f"{target}: cannot be written: {error.strerror}") from error
