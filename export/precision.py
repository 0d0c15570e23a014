"""Strongly typed graphs: matrix products in bf16 or fp16, everything else in float32, each border a Cast node.

It owns which operations are low and the casts between; it knows the low weights by name and nothing of the network they
come from. Inputs and outputs of a graph stay float32.

A product keeps its type through its bias, through GELU and through what only moves values, so what is wide is low in
memory. Norms, softmax, rotations, residual sums and all other arithmetic are float32: kernels compute in it anyway, and
what would be rounded in between is where errors grow.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from export.tracing import DTYPES, EXTERNAL_ABOVE, save
from model.config import Precision

if TYPE_CHECKING:
    import onnx

TYPES: dict[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "bf16": ir.DataType.BFLOAT16,
    "fp16": ir.DataType.FLOAT16,
}
PRODUCTS = {"MatMul", "Gemm", "Conv"}
MOVES = {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
LOW = {ir.DataType.BFLOAT16, ir.DataType.FLOAT16}


def lower(graph: ir.Graph, precision: Precision, low: Collection[str]) -> None:
    """Give a float32 `graph` its types. `low` names the weights that become low, and with them their products.

    A product of two activations, which is attention's, is low as well.
    """
    if precision == "fp32":
        return
    for name in low:
        if name in graph.initializers:
            graph.initializers[name].dtype = TYPES[precision]
    _Lowering(graph, TYPES[precision]).run()


def tensor(name: str, weight: Tensor) -> ir.TensorProtocol:
    """A weight of any type, over the memory it has."""
    return TorchTensor(weight, name=name)


class _Lowering:
    """One walk over a graph in its order: what a node takes has its type when the node is reached."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph, self._dtype = graph, dtype
        self._floats = {dtype, ir.DataType.FLOAT}
        self._fixed: set[ir.Value] = set(graph.initializers.values())
        """Weights, and what is made of weights alone."""
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for node in list(self._graph):
            given = [value for value in node.inputs if value is not None]
            if given and all(value in self._fixed for value in given):
                self._fixed.update(node.outputs)
            _type_outputs(node, given)
            is_low = self._is_low(node, [value for value in given if value.dtype in self._floats])
            self._convert_inputs(node, self._dtype if is_low else ir.DataType.FLOAT)
            for value in node.outputs:
                if is_low and value.dtype == ir.DataType.FLOAT:
                    value.dtype = self._dtype
        for place, value in enumerate(self._graph.outputs):
            if value.dtype == self._dtype:
                self._graph.outputs[place] = self._cast(value, ir.DataType.FLOAT, before=None)

    def _is_low(self, node: ir.Node, given: list[ir.Value]) -> bool:
        fixed = [value for value in given if value in self._fixed]
        if node.op_type in PRODUCTS:
            return all(value.dtype == self._dtype for value in fixed)
        is_bias = node.op_type == "Add" and len(fixed) == 1
        if node.op_type in MOVES or node.op_type == "Gelu" or is_bias:
            return bool(given) and all(value.dtype == self._dtype for value in given)
        return False

    def _convert_inputs(self, node: ir.Node, wanted: ir.DataType) -> None:
        if node.op_type in ("Shape", "Size"):  # take any type, and only look at the sizes
            return
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype in self._floats and value.dtype != wanted:
                node.replace_input_with(place, self._cast(value, wanted, before=node))

    def _cast(self, value: ir.Value, dtype: ir.DataType, *, before: ir.Node | None) -> ir.Value:
        """`value` as `dtype`, cast where it is first wanted and once."""
        found = self._casts.get((value, dtype))
        if found is None:
            node, found = cast_node(value, dtype)
            self._casts[value, dtype] = found
            if before is None:
                self._graph.append(node)
            else:
                self._graph.insert_before(before, node)
        return found


def _type_outputs(node: ir.Node, given: list[ir.Value]) -> None:
    """In float32, where the tracer left a type out. Comparisons never lack theirs; all else takes after its data."""
    if given and node.op_type not in ("Shape", "Size"):
        data = given[1] if node.op_type == "Where" else given[0]
        for value in node.outputs:
            if value.dtype is None and data.dtype is not None:
                value.dtype = ir.DataType.FLOAT if data.dtype in LOW else data.dtype


def cast_node(value: ir.Value, dtype: ir.DataType) -> tuple[ir.Node, ir.Value]:
    name = f"{value.name}/{dtype.name.lower()}"
    node = ir.node("Cast", [value], attributes={"to": dtype}, name=name)
    node.outputs[0].name, node.outputs[0].dtype = name, dtype
    return node, node.outputs[0]


def lower_file(source: Path, target: Path, precision: Precision, low: Collection[str]) -> None:
    """The float32 file at `source` again in another precision, without tracing again."""
    model = load(source)
    lower(model.graph, precision, low)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype != value.const_value.dtype:
            value.const_value = tensor(str(value.name), torch.tensor(value.const_value.numpy()).to(DTYPES[precision]))
    model.metadata_props["stiv.precision"] = precision
    save(model, target, EXTERNAL_ABOVE)


def load(path: Path) -> ir.Model:
    return cast(ir.Model, cast(Any, ir).load(path))


def emulate(source: Path, target: Path) -> None:
    """Write the low graph at `source` again in float32 with each result rounded to the low type, for proofs alone.

    Runtimes without bf16 (ONNX Runtime on a CPU) run it, and give what a product with a float32 accumulator gives.
    """
    model = load(source)
    _round_results(model.graph)
    save(model, target, EXTERNAL_ABOVE)


def emulated(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same of a graph in memory."""
    model = ir.from_proto(graph)
    _round_results(model.graph)
    return ir.to_proto(model)


def _round_results(graph: ir.Graph) -> None:
    for value in graph.initializers.values():
        if value.dtype in LOW and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.dtype = ir.DataType.FLOAT
    for node in list(graph):
        low = [value for value in node.outputs if value.dtype in LOW]
        for value in low:
            if node.op_type not in MOVES:
                _round(graph, node, value)
            else:
                value.dtype = ir.DataType.FLOAT


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let what uses `value` use it rounded to its own low type."""
    assert value.dtype is not None
    low = value.dtype
    uses = list(value.uses())
    if node.op_type == "Cast":  # keeps its type: it is the rounding
        up, result = cast_node(value, ir.DataType.FLOAT)
        graph.insert_after(node, up)
    else:
        value.dtype = ir.DataType.FLOAT
        down, rounded = cast_node(value, low)
        up, result = cast_node(rounded, ir.DataType.FLOAT)
        graph.insert_after(node, [down, up])
    for use in uses:
        use.node.replace_input_with(use.idx, result)
