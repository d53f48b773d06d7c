"""Names as labels."""

from collections.abc import Sequence

LONGEST = 40


def common_prefix(names: Sequence[str]) -> str:
    """The dotted path that all names begin with, to be left out of labels; empty where there is none."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(names) < 2 or len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def shortened(name: str, prefix: str = "") -> str:
    """A label: the name without a prefix, its end where it is too long."""
    rest = name.removeprefix(prefix)
    return rest if len(rest) <= LONGEST else f"…{rest[1 - LONGEST :]}"
