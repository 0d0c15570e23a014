"""Strongly typed graphs: the types stand in the file, where they should, and cost no more accuracy than is stated.

ONNX Runtime's CPU provider has no bf16. There a file is proven twice: as it is by onnx's reference evaluator on a small
shape, and on all shapes by the same graph in float32 with every low result rounded (`emulate`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from export.engines.onnx_runtime import OnnxEngine
from export.engines.torch import TorchEngine
from export.onnx import graph_weights
from export.parity.check import check_calls
from export.parity.report import BOUNDS
from export.precision import LOW, TYPES, emulate, load, lower_file
from model.config import Precision
from tests.tiny_export import Exported

LowFile = Callable[[Precision], Path]
FLOAT = ir.DataType.FLOAT


@pytest.fixture(scope="module")
def low_file(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> LowFile:
    folder = tmp_path_factory.mktemp("low")

    def write(precision: Precision) -> Path:
        path = folder / f"{precision}.onnx"
        if not path.exists():
            lower_file(exported.file.path, path, precision, low_names(exported, precision))
        return path

    return write


def low_names(exported: Exported, precision: Precision) -> list[str]:
    return [
        name for name, weight in graph_weights(exported.network, precision).items() if weight.dtype != torch.float32
    ]


def floats(values: Iterator[ir.Value | None] | tuple[ir.Value | None, ...]) -> set[ir.DataType]:
    return {value.dtype for value in values if value is not None and value.dtype in LOW | {FLOAT}}  # pyright: ignore


def weight_of(node: ir.Node) -> str | None:
    """Name of the weight a product multiplies with; None in attention."""
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        source = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value
        if source is not None and source.is_initializer():
            return source.name
    return None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_products_of_the_blocks_are_low_and_everything_that_sums_turns_or_norms_is_float32(
    low_file: LowFile, precision: Precision
) -> None:
    low, seen = TYPES[precision], Counter[str]()
    for node in load(low_file(precision)).graph:
        types = floats((*node.inputs, *node.outputs))
        if node.op_type in ("MatMul", "Gemm"):
            name = weight_of(node)
            is_low = name is None or name.startswith(("blocks.", "text_projection."))
            assert types == {low if is_low else FLOAT}, f"{node.op_type} by {name}: {types}"
            seen["attention" if name is None else name.split(".")[0]] += 1
        elif node.op_type in ("LayerNormalization", "Softmax", "Cos", "Sin", "Sigmoid", "Reciprocal", "Sqrt", "Sub"):
            assert types == {FLOAT}, f"{node.name}: {node.op_type} is {types}"
            seen[node.op_type] += 1
        elif node.op_type in ("Mul", "Pow", "ReduceMean") and types:
            assert types == {FLOAT}, f"{node.name}: {node.op_type} is {types}"
        elif node.op_type == "Add" and low in types:  # a residual sum never is low
            assert any(value is not None and value.is_initializer() for value in node.inputs), node.name
        elif node.op_type == "Gelu":
            assert types == {low}, node.name
    # Three blocks of three attentions; seven linear layers in attention, two in the feed-forward.
    assert seen["attention"] == 3 * 3 * 2 and seen["blocks"] == 3 * (3 * 3 + 2) and seen["Softmax"] == 9
    assert seen["text_projection"] == 2 and seen["timestep_embedding"] == 2 and seen["micro_embeddings"] == 8
    assert seen["patch_embedding"] == seen["final"] - 1 == seen["modulation"] == seen["pooled_projection"] == 1
    assert seen["LayerNormalization"] == 6 + 3 * 6 + 1 and seen["Sub"] == 3 * 2 * 2  # RoPE in two of three attentions


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_low_file_is_valid_and_its_ends_and_weights_have_the_types_that_are_promised(
    exported: Exported, low_file: LowFile, precision: Precision
) -> None:
    path = low_file(precision)
    onnx.checker.check_model(onnx.load(path), full_check=True)  # strict on types
    model = load(path)
    assert model.metadata_props["stiv.precision"] == precision
    assert floats((*model.graph.inputs, *model.graph.outputs)) == {FLOAT}
    promised = graph_weights(exported.network, precision)
    for name, value in model.graph.initializers.items():
        if name in promised:
            assert str(value.dtype) == {torch.float32: "FLOAT"}.get(promised[name].dtype, str(TYPES[precision])), name
    assert path.stat().st_size < 0.85 * exported.file.path.stat().st_size


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_value_is_cast_twice_and_none_there_and_back(low_file: LowFile, precision: Precision) -> None:
    casts = [node for node in load(low_file(precision)).graph if node.op_type == "Cast"]
    assert len({(node.inputs[0], node.outputs[0].dtype) for node in casts}) == len(casts)
    for node in casts:
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        assert source is None or source.op_type != "Cast"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounded_in_every_step_the_file_is_within_its_bounds_and_not_within_the_next_finer_ones(
    exported: Exported, low_file: LowFile, tmp_path: Path, precision: Precision
) -> None:
    path = low_file(precision)
    if precision == "fp16":  # which ONNX Runtime runs; bf16 it emulates by itself
        path = tmp_path / "emulated.onnx"
        emulate(low_file(precision), path)
    engine = OnnxEngine(path, threads=1)
    shapes = exported.profile.corners()
    report = check_calls(TorchEngine(exported.network), engine, exported.inputs, shapes=shapes, precision=precision)
    report.require_passed()
    finer = BOUNDS["fp16" if precision == "bf16" else "fp32"]
    assert report.worst_call.max_abs_error > finer.max_abs_error


def test_onnx_runtime_runs_the_fp16_file_as_it_is(exported: Exported, low_file: LowFile) -> None:
    engine, shapes = OnnxEngine(low_file("fp16"), threads=1), exported.profile.corners()
    check_calls(
        TorchEngine(exported.network), engine, exported.inputs, shapes=shapes, precision="fp16"
    ).require_passed()


def test_the_bf16_file_itself_computes_what_it_should(exported: Exported, low_file: LowFile) -> None:
    latents, timestep, given = exported.inputs.call(exported.profile.min, seed=0)
    values = (latents, timestep, given.text, given.text_mask, given.pooled, given.micro)
    feeds = {name: value.numpy() for name, value in zip(exported.profile.signature(), values, strict=True)}
    (found,) = ReferenceEvaluator(onnx.load(low_file("bf16"))).run(None, feeds)
    velocity = np.asarray(found)
    expected = TorchEngine(exported.network).denoise(latents, timestep, given).numpy()
    assert velocity.dtype == np.float32
    assert 1e-4 < np.abs(velocity - expected).max() < BOUNDS["bf16"].max_abs_error
