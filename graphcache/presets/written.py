"""Plans as they are written on one line: a preset with its options, a file, or the plan's own text."""

from graphcache import presets
from graphcache.ir.errors import PlanError
from graphcache.ir.plan import Plan, Preset, Value
from graphcache.ir.plantext import parse_value


def written_plan(text: str, steps: int | None) -> Plan:
    """A plan's text, or what `plan_argument` takes.

    Raises:
        PlanError: it is none of these.
    """
    return Plan.parse(text) if "\n" in text.strip() else plan_argument(text.strip(), steps)


def plan_argument(text: str, steps: int | None) -> Plan:
    """A plan file, or `preset[:steps[:key=value,…]]`; `steps` are those of presets that name none."""
    name, _, rest = text.partition(":")
    if name not in presets.names():
        return Plan.load(text)
    count, _, options = rest.partition(":")
    if count and not count.isdigit():
        raise PlanError(f"'{text}': write preset:steps:key=value, for example fora:50:interval=3")
    if not count and steps is None:
        raise PlanError(f"'{text}' does not say how many steps; write {name}:50")
    return preset_argument(name, int(count or steps or 0), options.split(",") if options else [])


def preset_argument(name: str, steps: int, options: list[str]) -> Plan:
    """A preset evaluated with options written as name=value."""
    return presets.evaluate(Preset(name, tuple(map(assignment, options))), steps)


def assignment(text: str) -> tuple[str, Value]:
    """name=value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise PlanError(f"'{text}' is no name=value")
    return name, parse_value(value)
