"""Graphs of profiling and tuning are kept for the very program or phase that they were made of."""

import gc
from itertools import cycle, islice

from graphcache import Plan
from graphcache.compiler.program import Program
from graphcache.ir.graph import value_of
from graphcache.ir.roles import Names
from graphcache.planning.in_stretches import InStretches
from graphcache.planning.probing import ProbeEngine
from graphcache.planning.tuning_engine import TuningEngine, Weights
from graphcache.runtime.options import Options
from reference import capture_call
from tiny import arguments, tiny

MODEL, SIZES = tiny(1), (3, 4)
PLAN = Plan.parse("plan steps=3 preset=none\nf = fitted order=1\n@mlp ##f\n  step 2 = 1.5 -0.5")
CAPTURED = {count: capture_call(MODEL, arguments(tokens=count), "timestep") for count in SIZES}


def tokens_of(graph: InStretches) -> int:
    latents = graph.runnable.step.placeholders()[0]
    return value_of(latents).shape[1]


def test_a_program_in_the_memory_of_another_is_not_taken_for_it() -> None:
    engine = ProbeEngine(MODEL, Options(Plan(2)))
    for count in islice(cycle(SIZES), 12):
        program = Program(CAPTURED[count], None).prepared()
        assert tokens_of(engine.probe(program)) == count
        assert engine.probe(program) is engine.probe(program)
        del program
    gc.collect()
    assert not engine._probes


def test_a_phase_in_the_memory_of_another_is_not_taken_for_it() -> None:
    engine = TuningEngine(MODEL, Weights(PLAN), Names())
    for count in islice(cycle(SIZES), 12):
        program = Program(CAPTURED[count], None).prepared()
        phase = program.phase(program.schedule(PLAN), 0)
        assert tokens_of(engine.cut_once(phase)) == count
        assert engine.cut_once(phase) is engine.cut_once(phase)
        del phase, program
    gc.collect()
    assert not engine._cut
