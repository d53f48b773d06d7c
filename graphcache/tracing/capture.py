"""From a module and one call of it to a functional StepGraph."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import Output, StepGraph, fake_mode, value_of, weights_of
from graphcache.ir.opaque import Opaque
from graphcache.libraries.kernels import ChosenKernels
from graphcache.libraries.quiet import quiet_tracing
from graphcache.libraries.torch_private import (
    HigherOrderOperator,
    OpOverload,
    forget_real,
    schema_of,
    use_lazy_graph_module,
)
from graphcache.tracing.answers import Answers, Diverged
from graphcache.tracing.asking import Traced, decided, traced
from graphcache.tracing.casts import traced_casts
from graphcache.tracing.explanation import Stopped, because, explain
from graphcache.tracing.functional import (
    Unknown,
    detached,
    functional,
    inlined,
    is_functional,
)
from graphcache.tracing.homes import Homes
from graphcache.tracing.hooks import is_own
from graphcache.tracing.numeric_time import about_numbers, refuse_unlike_numbers, run_as_tensors
from graphcache.tracing.opaque import is_foreign, named
from graphcache.tracing.opened import open_operations
from graphcache.tracing.plain_tensors import Originals
from graphcache.tracing.rehearsal import alone, rehearse
from graphcache.tracing.standing_in import StandIns
from graphcache.tracing.undisturbed import undisturbed
from graphcache.tracing.unlifted import unlifted
from graphcache.tracing.unseen_writes import SeenWrites
from graphcache.tracing.untraceable import CalledAsTheyAre, Untraceable

_PURE_RANDOM = {
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.dropout.default,
}


def capture(
    model: nn.Module,
    call: CallSpec,
    tensors: tuple[torch.Tensor, ...],
    asks: bool = False,
    before: Sequence[Opaque] = (),
    symbols: bool = False,
    homes: Homes | None = None,
) -> Traced:
    """Trace one evaluation of `model` into a pure graph over flat tensors.

    Where forward asks for values of inputs that a generation keeps, it is traced with the answers of a real
    call. Other captures cost no more for that.

    Args:
        model: in eval mode, without hooks but those that move weights.
        call: how the flat tensors make up the arguments.
        tensors: example leaves; beside the values that forward asks for, only their shapes, strides, dtypes
            and devices matter.
        asks: whether forward is known to ask for values.
        before: opaque calls of an earlier capture, whose modules are not tried again.
        symbols: trace with symbols for the inputs' sizes, without answers and opaque calls.
        homes: where weights are that are kept elsewhere than on the device that computes.

    Returns:
        The graph, sharing the model's parameters, the structure of the model's result, and the values that
        the graph is right for.

    Raises:
        CaptureError: for whatever a graph cannot hold, naming the cause and what to do about it.
    """
    originals = Originals()
    tensors = tuple([originals.plain(tensor) for tensor in tensors])
    devices = {tensor.device for tensor in (*tensors, *model.parameters())}

    homes = Homes(model) if homes is None else homes
    stand_ins = StandIns(model, CalledAsTheyAre(model, before))

    def called(answers: Answers | None) -> None:
        with homes.at_hand():
            called_at_hand(answers)

    def called_at_hand(answers: Answers | None) -> None:
        if answers is not None:
            with stand_ins.apart(answers.paused), answers.record():
                run_as_tensors(call, model, tensors)
        else:
            first_called()
        numbers = [tensors[index] for index in call.numbers]
        stand_ins.observe(lambda: run_as_tensors(call, model, tensors), numbers)

    def first_called() -> None:
        with ChosenKernels():
            if call.numbers:
                refuse_unlike_numbers(call, model, tensors)
            else:
                OutputSpec.of(*call.run(model, tensors))

    def attempt(answers: Answers | None) -> Traced:
        return undisturbed(
            model,
            originals,
            lambda: rehearse(lambda: called(answers), devices),
            lambda: _traced(model, call, tensors, originals, stand_ins, answers, symbols, homes),
        )

    with alone(model, devices):
        while True:
            if symbols:
                return attempt(None)
            try:
                return traced(attempt, asks)
            except Untraceable as error:
                stand_ins.chosen.widen(error)


def _traced(
    model: nn.Module,
    call: CallSpec,
    tensors: tuple[torch.Tensor, ...],
    originals: Originals,
    stand_ins: StandIns,
    answers: Answers | None,
    symbols: bool,
    homes: Homes,
) -> Traced:
    from graphcache.libraries.torch_compilers_private import unbacked_symbols_where_there_are_any

    if answers is not None and not answers.given:
        raise Diverged
    outputs: list[OutputSpec] = []
    wrapper = _FlatCall(model, call, stand_ins.begin, outputs.append, answers)
    try:
        with (
            homes.standing_in() as away,
            stand_ins.standing_in(),
            quiet_tracing(),
            _without_stack_traces(),
            # export writes code for modules that nobody calls, which takes a seventh of the time
            use_lazy_graph_module(True),
            unbacked_symbols_where_there_are_any(),
            traced_casts(model),
        ):
            every = tuple([dict.fromkeys(range(one.dim()), torch.export.Dim.AUTO) for one in tensors])
            sizes = {"tensors": every} if symbols else None
            program = torch.export.export(wrapper, tensors, strict=False, dynamic_shapes=sizes)
            state = program.state_dict
            program, graph = _functional(program)
    except CaptureError as error:
        raise Untraceable(str(error), stand_ins.chosen.around_error(error), f": {error}") from error
    except Exception as error:
        reason = explain(error) + "." * bool(call.numbers) + about_numbers(call)
        around = stand_ins.chosen.around_error(error)
        cause = error.__cause__ if isinstance(error, Stopped) else error
        raise Untraceable(reason, around, because(error)) from cause
    _refuse_mutation(program.graph_signature)
    found = unlifted(program, graph, state)
    if not away:  # it computes, and stand-ins have no values
        open_operations(found.graph, found.held, tensors)
    _refuse_foreign(found.graph, found.held)
    _refuse_ops(found.graph)
    results: Any = found.graph.output_node().args[0]
    forget_real(fake_mode(value_of(next(iter(found.graph.nodes)))))
    step = StepGraph(
        weights_of({name: originals.of(value) for name, value in found.held.items()}, found.graph),
        found.graph,
        call.ports(),
        tuple(Output(index) for index in range(len(results))),
        opaque=stand_ins.calls,
        homes=away,
        packed=found.packed,
    )
    if answers is None:
        return Traced(step, outputs[-1], None)
    return decided(step, outputs[-1], answers, tensors, about_numbers(call))


@contextlib.contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Leave out the source lines of each node, which take a quarter of the time and which nothing reads."""
    config: Any = fx.config
    before = getattr(config, "do_not_emit_stack_traces", None)
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


class _FlatCall(nn.Module):
    """The model behind a flat signature; remembers the structure of what it returned."""

    def __init__(
        self,
        model: nn.Module,
        call: CallSpec,
        begins: Callable[[], None],
        returned: Callable[[OutputSpec], None],
        answers: Answers | None,
    ) -> None:
        super().__init__()
        self.begins = begins
        self.model = model
        self.call = call
        self.answers = answers
        if answers is not None:
            self.values = answers.tensors
        # export restores every attribute that forward sets, so the structure leaves through a function
        self.returned = returned

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.begins()
        try:
            replay = self.answers.replay(self.values) if self.answers else contextlib.nullcontext()
            with replay, SeenWrites():
                result, taken = run_as_tensors(self.call, self.model, tensors)
            output, leaves = OutputSpec.of(result, taken)
        except CaptureError:
            raise
        except Exception as error:
            raise Stopped from error
        self.returned(output)
        return (*leaves, *(tensor for _, tensor in self.answers.asked)) if self.answers else leaves


def _functional(program: Any) -> tuple[Any, fx.Graph]:
    """The program and its graph without in-place operations, whose writes into views would be lost otherwise.

    PyTorch's own way traces once more, which takes as long as the export itself.
    """
    graph = inlined(program.graph)
    detached(graph)
    if is_functional(graph):
        return program, graph
    try:
        return program, functional(graph)
    except Unknown:
        program = program.run_decompositions({})
        return program, program.graph


def _refuse_mutation(signature: Any) -> None:
    changed = {OutputKind.BUFFER_MUTATION: "buffer", OutputKind.USER_INPUT_MUTATION: "input"}
    for output in signature.output_specs:
        if output.kind in changed:
            raise CaptureError(
                f"the model's forward changes the {changed[output.kind]} '{output.target}' in place; "
                "a cached step would skip that change: make forward pure"
            )
    for entry in signature.input_specs:
        if entry.kind == InputKind.TOKEN:
            raise CaptureError(
                "the model's forward has effects beyond its result (an effect token); make it pure"
            )


def _refuse_foreign(graph: fx.Graph, held: Mapping[str, Any]) -> None:
    """Weights of which tracing saw the bytes alone must be read by opaque calls only."""
    for node in graph.find_nodes(op="get_attr"):
        value = held.get(node.target)
        if isinstance(value, torch.Tensor) and is_foreign(value):
            reader = next(iter(node.users))
            raise _untraceable(reader, f"reads '{node.target}', a {type(value).__name__}, as plain bytes")


def _refuse_ops(graph: fx.Graph) -> None:
    for node in graph.nodes:
        target = node.target
        if isinstance(target, HigherOrderOperator):
            raise _untraceable(node, f"runs {target}, whose inner graph cannot be rewritten")
        if not isinstance(target, OpOverload):
            continue
        if schema_of(target).is_mutable:
            raise _untraceable(node, f"runs {target}, which changes its input in place")
        if _drops(node):
            raise CaptureError(f"{_place(node)} runs dropout in training mode; pass training=self.training")
        if torch.Tag.nondeterministic_seeded in target.tags and target not in _PURE_RANDOM:
            raise CaptureError(
                f"{_place(node)} draws random numbers ({target}); a plan cannot say what reusing them means: "
                "draw them outside the model and pass them in"
            )


def _drops(node: fx.Node) -> bool:
    """Whether dropout is active, on its own or within attention."""
    if node.target is torch.ops.aten.dropout.default:
        return bool(node.args[1] and node.args[2])
    is_attention = node.target is torch.ops.aten.scaled_dot_product_attention.default
    return is_attention and bool((node.args[4:5] and node.args[4]) or node.kwargs.get("dropout_p"))


def _untraceable(node: fx.Node, does: str) -> Untraceable:
    return Untraceable(f"{_place(node)} {does}", _around(node), f": it {does}")


def _place(node: fx.Node) -> str:
    around = _around(node)
    return named(around[0]) if around else "the model"


def _around(node: fx.Node) -> list[str]:
    """The paths of the modules that a node was traced in, from the inside out."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    found = [re.sub(r"@\d+", "", path).removeprefix("model").lstrip(".") for path in reversed(paths)]
    return [path for path in found if path]


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the model's forward, without self."""
    own = model.__dict__.get("forward")
    if own is not None and is_own(model):
        return inspect.signature(own).parameters
    signature = inspect.signature(type(model).forward)
    return dict(list(signature.parameters.items())[1:])
