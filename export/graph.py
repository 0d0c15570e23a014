"""Surgery on a traced ONNX graph: tidying it, and repeating its one traced block to the network's depth.

It knows the block's two ends and its weights by name; it knows nothing of PyTorch or of what a block computes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter

TRACED = "blocks.0."
"""Prefix of the traced block's weights; block i's are `blocks.{i}.`."""


@dataclass(slots=True, frozen=True)
class BlockEnds:
    """The value that enters the traced block and the one that leaves it."""

    entering: ir.Value
    leaving: ir.Value


def tidy(model: ir.Model, weights: Collection[str]) -> None:
    """Fold constants and drop what is computed twice, blind to the values of the weights until `fill` brings them.

    What is done because of a weight's value (it is zero, or equal to another) holds for the traced block alone, and
    not for the weights of a later checkpoint.
    """
    for name in weights:
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = None
    cast(Any, optimizer).fold_constants(model)
    rewriter.rewrite(model)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.ClearMetadataAndDocStringPass(),  # holds stack traces with paths of the exporting machine
    ):
        step(model)


def repeat_block(graph: ir.Graph, ends: BlockEnds, depth: int) -> None:
    """Chain `depth` copies of the traced block, each over weights of its own.

    What the block takes from outside without changing it (angles, modulation, text) stays computed once.
    """
    inside = _nodes_inside(graph, ends)
    after = list(ends.leaving.uses())
    last = ends.leaving
    for index in range(1, depth):
        values = {ends.entering: last} | _own_weights(graph, inside, index)
        copies = [_copy(node, values, index) for node in inside]
        producer = last.producer()
        assert producer is not None
        graph.insert_after(producer, copies)
        last = values[ends.leaving]
    for use in after:
        use.node.replace_input_with(use.idx, last)


def fill(graph: ir.Graph, weights: Mapping[str, ir.TensorProtocol]) -> None:
    """Give the graph's weights their values."""
    for name, value in graph.initializers.items():
        if name in weights:
            value.const_value = weights[name]


def _nodes_inside(graph: ir.Graph, ends: BlockEnds) -> list[ir.Node]:
    """Nodes, in order, that lead to the leaving value and follow from the entering one or from the block's weights."""
    needed: set[ir.Value] = {ends.leaving}
    for node in reversed(graph):
        if node is not ends.entering.producer() and any(value in needed for value in node.outputs):
            needed.update(value for value in node.inputs if value is not None)
    own = {ends.entering} | {value for name, value in graph.initializers.items() if name.startswith(TRACED)}
    inside: list[ir.Node] = []
    for node in graph:
        if any(value in own for value in node.inputs) and any(value in needed for value in node.outputs):
            own.update(node.outputs)
            inside.append(node)
    return inside


def _own_weights(graph: ir.Graph, nodes: list[ir.Node], index: int) -> dict[ir.Value, ir.Value]:
    """Traced weight -> the one of block `index`, which becomes an initializer of the graph."""
    own: dict[ir.Value, ir.Value] = {}
    for value in {value: None for node in nodes for value in node.inputs if value is not None}:
        if value.name is not None and value.name.startswith(TRACED) and value.is_initializer():
            name = f"blocks.{index}.{value.name.removeprefix(TRACED)}"
            own[value] = ir.Value(name=name, shape=value.shape, type=value.type)
            graph.initializers.add(own[value])
    return own


def _copy(node: ir.Node, values: dict[ir.Value, ir.Value], index: int) -> ir.Node:
    """A copy of `node` over `values`, which gains its outputs; a value it lacks comes from outside the block."""
    inputs = [None if value is None else values.get(value, value) for value in node.inputs]
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"blocks.{index}/{node.name}",
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.type = f"blocks.{index}/{old.name}", old.type
        values[old] = new
    return copy
