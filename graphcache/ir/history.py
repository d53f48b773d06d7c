"""Names of what is cached: a history is the values of one site over the steps, newest first."""

from typing import Literal, NamedTuple

Content = Literal["value", "patched", "scores", "operand", "handle"]

OUTPUT = "output"
"""The site of the model's results."""
GUIDANCE = "guidance"
"""The site of the difference between the branches of guidance."""
PREDICTION = "prediction"
"""The site of the conditional branch's result, kept for the unconditional branch's call at the same step."""


def range_site(first: int, last: int) -> str:
    """The site of what the blocks from `first` to `last` change together."""
    return f"range({first}..{last})"


class History(NamedTuple):
    """What is cached of a site.

    `content` is the site's `value`; the `patched` copy of it, into which tokens are written beside a value
    that forecasts read; the `scores` of its tokens; an `operand` that chosen tokens meet whole, attention's
    keys or values, of which `number` tells several apart; or the `handle` of a range, the stream behind it,
    whose gradient is that of the range's change. `unconditional` histories are those of the unconditional
    half of a doubled batch.
    """

    site: str
    content: Content = "value"
    number: int = 0
    unconditional: bool = False

    @property
    def is_value(self) -> bool:
        """Whether this is the site's own value, of the whole batch or of its conditional half."""
        return self.content == "value" and not self.unconditional

    @property
    def patched(self) -> "History":
        return self._replace(content="patched")

    @property
    def scores(self) -> "History":
        return self._replace(content="scores")

    @property
    def other_half(self) -> "History":
        """The same of the unconditional half of a doubled batch."""
        return self._replace(unconditional=True)

    def __str__(self) -> str:
        text = self.site + "|uncond" * self.unconditional
        if self.content == "operand":
            return f"{text}|operand.{self.number}"
        return text if self.content == "value" else f"{text}|{self.content}"
