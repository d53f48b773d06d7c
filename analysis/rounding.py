"""Where a graph computes with so few bits that gradients say nothing: behind values that were rounded."""

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import LATENT, Dataflow
from graphcache.analysis.sites import module_path
from graphcache.ir.graph import StepGraph, is_tensor, value_of


def rounded_within(step: StepGraph) -> str | None:
    """The path of the first module that rounds what depends on the latents, to compute with it.

    None if there is none. Looked at is what takes one byte a number: indices are wider, masks no numbers.
    """
    flow = Dataflow(step)
    for node in flow.nodes:
        if _computes_with_numbers(node) and any(_is_rounded(flow, item) for item in node.all_input_nodes):
            return module_path(node)
    return None


def _computes_with_numbers(node: fx.Node) -> bool:
    if node.op != "call_function" or not is_tensor(node):
        return False
    return ops.is_product(node) or (node.target in ops.COPIES and value_of(node).is_floating_point())


def _is_rounded(flow: Dataflow, node: fx.Node) -> bool:
    if not is_tensor(node) or not flow.depends[node] & LATENT:
        return False
    value = value_of(node)
    return value.element_size() == 1 and value.dtype.is_signed
