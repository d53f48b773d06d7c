"""Which sites a row of a plan speaks of."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from graphcache.ir.errors import PlanError

STEM = "stem"
"""The role of a residual branch outside of the repeated blocks, which globs do not match."""

ROLES = (
    "self",
    "self.spatial",
    "self.temporal",
    "cross",
    "joint",
    "parallel",
    "parallel.attention",
    "parallel.mlp",
    "mlp",
    STEM,
)
SelectorKind = Literal["role", "glob", "name", "range", "guidance", "output"]

_NUMBER = r"(\d{1,18}(?:\.\d+)?(?:e-?\d+)?)"
_RANGE = re.compile(rf"range\({_NUMBER}\.\.{_NUMBER}\)")
_ROLE = re.compile(rf"@([\w.]+)(?:\[{_NUMBER}\.\.{_NUMBER}\])?")
_RESERVED = re.compile(r"[\s;=()]")


class BranchLike(Protocol):
    """What a selector asks of a branch site."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def context(self) -> bool: ...
    @property
    def block(self) -> int: ...
    @property
    def depth(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Selector:
    """The left column of a row.

    `name` is the role, glob or site name. `bounds` are inclusive: the depths of a role, and of a range
    either its depths (`fractional`) or its block indices.
    """

    kind: SelectorKind
    name: str = ""
    bounds: tuple[float, float] | None = None
    fractional: bool = True

    @classmethod
    def parse(cls, text: str) -> "Selector":
        """Reads `@self`, `@mlp[0..0.5]`, `*`, a glob, a name, `range(a..b)`, `guidance` or `output`."""
        if text == "guidance":
            return cls("guidance")
        if text == "output":
            return cls("output")
        if text.startswith("@"):
            return _parse_role(text)
        if text.startswith("range("):
            return _parse_range(text)
        if not text or _RESERVED.search(text) or not text.isprintable():
            raise PlanError(f"{text!r} is no site name: spaces and any of ; = ( ) cannot occur in one")
        return cls("glob" if re.search(r"[*?\[]", text) else "name", text)

    def __str__(self) -> str:
        if self.kind == "role":
            depth = "" if self.bounds is None else "[{}..{}]".format(*map(_short, self.bounds))
            return f"@{self.name}{depth}"
        if self.bounds is not None:
            convert = float if self.fractional else int
            return "range({!r}..{!r})".format(*map(convert, self.bounds))
        return self.name or self.kind

    @property
    def is_role(self) -> bool:
        return self.kind == "role"

    @property
    def is_range(self) -> bool:
        return self.kind == "range"

    @property
    def is_output(self) -> bool:
        return self.kind == "output"

    @property
    def splits(self) -> bool:
        """Whether the row speaks of the attention or the MLP of a fused branch alone."""
        return self.is_role and self.name.startswith("parallel.")

    @property
    def is_guidance(self) -> bool:
        return self.kind == "guidance"

    @property
    def is_branches(self) -> bool:
        """Whether the row speaks of branches, not of a range or a pseudo-site."""
        return not (self.is_guidance or self.is_output or self.is_range)

    def matches(self, site: BranchLike) -> bool:
        """Whether the row speaks of this branch; ranges and pseudo-sites match none, and globs no stem."""
        if self.kind == "name":
            return site.name == self.name
        if self.kind == "glob":
            return site.role != STEM and fnmatchcase(site.name, self.name)
        if self.kind != "role":
            return False
        role = self.name.removesuffix(".context")
        if role != self.name and not site.context:
            return False
        if self.bounds is not None and not self.bounds[0] <= site.depth <= self.bounds[1]:
            return False
        return site.role == role or site.role.startswith(f"{role}.")

    def blocks(self, count: int) -> range:
        """The consecutive blocks of a range, of a model with `count` blocks."""
        if self.kind != "range" or self.bounds is None:
            raise PlanError(f"{self} is not a range of blocks")
        low, high = self.bounds
        if not self.fractional:
            if high >= count:
                raise PlanError(f"{self} ends beyond the last block: the model has blocks 0 to {count - 1}")
            return range(int(low), int(high) + 1)
        last = max(count - 1, 1)
        inside = [block for block in range(count) if low <= block / last <= high]
        if not inside:
            raise PlanError(f"{self} holds none of the model's {count} blocks; widen it")
        return range(inside[0], inside[-1] + 1)


def _parse_role(text: str) -> Selector:
    found = _ROLE.fullmatch(text)
    if found is None:
        raise PlanError(f"{text!r} is no role: write @self, @mlp.context or @mlp[0..0.5]")
    name, low, high = found.groups()
    if name.removesuffix(".context") not in ROLES:
        known = ", ".join(f"@{role}" for role in ROLES)
        raise PlanError(f"unknown role @{name}; roles are {known}, each also with .context")
    return Selector("role", name, None if low is None else _fractions(text, low, high))


def _parse_range(text: str) -> Selector:
    found = _RANGE.fullmatch(text)
    if found is None:
        raise PlanError(f"{text!r} is no range: write range(0..13) for blocks or range(0.0..0.5) for depths")
    low, high = found.groups()
    if any(mark in low + high for mark in ".e"):
        return Selector("range", bounds=_fractions(text, low, high))
    if int(low) > int(high):
        raise PlanError(f"{text!r} is empty: its first block comes after its last")
    return Selector("range", bounds=(int(low), int(high)), fractional=False)


def _fractions(text: str, low: str, high: str) -> tuple[float, float]:
    bounds = float(low), float(high)
    if not 0 <= bounds[0] <= bounds[1] <= 1:
        raise PlanError(f"{text!r}: depths are fractions from 0 to 1, the smaller one first")
    return bounds


def _short(bound: float) -> str:
    return repr(float(bound)).removesuffix(".0")
