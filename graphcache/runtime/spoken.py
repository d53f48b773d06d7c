"""What an engine's log has said, so that it says it once."""

import logging

from graphcache.analysis.coverage import coverage
from graphcache.ir.graph import StepGraph
from graphcache.ir.plan import Plan

log = logging.getLogger("graphcache")


class Spoken:
    """Warnings of one engine, each given once."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._presets: set[str] = set()

    def once(self, text: str) -> None:
        if text not in self._texts:
            self._texts.add(text)
            log.warning("%s", text)

    def of_preset(self, plan: Plan) -> None:
        """Take it that what is to be said of a plan's preset was said."""
        if plan.preset is not None:
            self._presets.add(plan.preset.name)

    def of_coverage(self, plan: Plan, step: StepGraph) -> None:
        """Warn of a preset that speaks of little of what it is meant for, in this model."""
        if plan.preset is None or plan.preset.name in self._presets:
            return
        self.of_preset(plan)
        for part in coverage(step, plan):
            if part.share < 0.5:
                self.once(
                    f"preset {plan.preset.name} speaks of {part}; what is left computes at every step: "
                    "graphcache.inspect lists the sites and their roles, for rows of your own"
                )
