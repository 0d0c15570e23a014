"""Fewer passes over memory for ONNX Runtime on a CPU: operators of its own in place of what the graph spells out.

It owns the patterns; it knows nothing of sessions. The exported file stays standard ONNX: a graph is rewritten in
memory when it is opened, and a pattern that is not found is left as it is, which costs time and changes nothing.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

CONTRIBUTED = "com.microsoft"
AXIS = -1


def fuse(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same function as `graph` by ONNX Runtime's own operators, with the weights where they were."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    model = ir.from_proto(graph)
    model.opset_imports[CONTRIBUTED] = 1
    for node in list(model.graph):
        if node.op_type == "Pow":
            _fuse_norm(model.graph, node)
    turns = _Turns(model.graph)
    for node in list(model.graph):
        if node.op_type == "Concat":
            turns.fuse(node)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    return ir.to_proto(model)


def _fuse_norm(graph: "ir.Graph", power: "ir.Node") -> None:
    """x / sqrt(mean(x^2) + epsilon) * weight: an RMSNorm over the last axis."""
    import onnx_ir as ir

    chain = list(_chain(power, ("ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul", "Mul")))
    if len(chain) != 6:
        return
    mean, shifted, *_, unit, last = chain
    source, weight = power.inputs[0], _other(last, unit.outputs[0])
    epsilon = _scalar(_other(shifted, mean.outputs[0]))
    two, axes = _scalar(power.inputs[1]), _scalar(mean.inputs[1] if len(mean.inputs) > 1 else None)
    if source not in unit.inputs or weight is None or not weight.is_initializer() or epsilon is None:
        return
    if two != 2 or axes != AXIS or weight.shape is None or weight.shape.rank() != 1:
        return
    attributes: Any = {"axis": AXIS, "epsilon": epsilon, "stash_type": 1}
    node = ir.node("SimplifiedLayerNormalization", [source, weight], attributes=attributes, name=f"{power.name}/norm")
    node.outputs[0].name = f"{power.name}/norm"
    graph.insert_before(last, node)
    last.outputs[0].replace_all_uses_with(node.outputs[0])


class _Turns:
    """RoPE: both halves of every head turned by one angle."""

    def __init__(self, graph: "ir.Graph") -> None:
        self._graph = graph
        self._tables: dict[ir.Value, ir.Value] = {}
        """Cosines or sines [1, N, 1, half] -> the same as [N, half]."""
        self._constants: dict[str, ir.Value] = {}

    def fuse(self, joined: "ir.Node") -> None:
        """concat(first * cos - second * sin, second * cos + first * sin) of x [B, N, heads, size]."""
        makers = [None if value is None else value.producer() for value in joined.inputs]
        if [maker and maker.op_type for maker in makers] != ["Sub", "Add"]:
            return
        minus, plus = cast("list[ir.Node]", makers)
        found = _product(minus.inputs[0]), _product(minus.inputs[1])
        if None in found:
            return
        (first, cosine), (second, sine) = cast(Any, found)
        split = first.producer()
        sums = {pair for value in plus.inputs if (pair := _product(value)) is not None}
        if split is None or split.op_type != "Split" or list(split.outputs) != [first, second]:
            return
        if sums != {(second, cosine), (first, sine)}:
            return
        source = cast("ir.Value", split.inputs[0])
        flat = self._node(joined, "Reshape", [source, self._constant("turn/flat", [0, 0, -1])], "flat")
        start = self._constant("turn/start", [0])
        turned = self._node(
            joined, "RotaryEmbedding", [flat, start, self._table(cosine), self._table(sine)], "turned", CONTRIBUTED
        )
        shape = self._node(joined, "Shape", [source], "shape")
        heads = self._node(joined, "Reshape", [turned, shape], "heads")
        joined.outputs[0].replace_all_uses_with(heads)

    def _node(
        self, before: "ir.Node", operator: str, inputs: "list[ir.Value]", name: str, domain: str = ""
    ) -> "ir.Value":
        import onnx_ir as ir

        node = ir.node(operator, inputs, domain=domain, name=f"{before.name}/{name}")
        node.outputs[0].name = f"{before.name}/{name}"
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _table(self, values: "ir.Value") -> "ir.Value":
        import onnx_ir as ir

        if values not in self._tables:
            producer = values.producer()
            assert producer is not None
            node = ir.node("Squeeze", [values, self._constant("turn/axes", [0, 2])], name=f"{values.name}/table")
            node.outputs[0].name = f"{values.name}/table"
            self._graph.insert_after(producer, node)
            self._tables[values] = node.outputs[0]
        return self._tables[values]

    def _constant(self, name: str, values: list[int]) -> "ir.Value":
        import onnx_ir as ir

        if name not in self._constants:
            tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
            value = ir.Value(
                name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.initializers.add(value)
            self._constants[name] = value
        return self._constants[name]


def _chain(node: "ir.Node", operators: tuple[str, ...]) -> "Iterator[ir.Node]":
    """The nodes after `node` that use each other's output alone, as far as they are `operators`."""
    for operator in operators:
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != operator:
            return
        node = users[0]
        yield node


def _other(node: "ir.Node", value: "ir.Value") -> "ir.Value | None":
    rest = [each for each in node.inputs if each is not value]
    return rest[0] if len(rest) == 1 else None


def _product(value: "ir.Value | None") -> "tuple[ir.Value, ir.Value] | None":
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul" or None in node.inputs:
        return None
    left, right = node.inputs
    return cast(Any, (left, right))


def _scalar(value: "ir.Value | None") -> float | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))
