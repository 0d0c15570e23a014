"""Quantised graphs: which products are low, by scales from real trajectories, and what parity says of them."""

from pathlib import Path

import onnx
import pytest

from export.engines.card import describe
from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import EngineMismatch
from export.engines.torch import TorchEngine
from export.engines.weights import write_refitted
from export.parity.check import check_calls, compare_rows
from export.parity.report import ParityFailed
from export.precision import load
from export.quantize import TYPES, Kind, calibrate, quantize_file, quantized_layers
from export.tensorrt.builder import build_plan
from export.tensorrt.options import BuildOptions
from export.tensorrt.plans import malformed
from tests.tiny_export import Exported

KINDS: tuple[Kind, ...] = ("int8", "fp8")


@pytest.fixture(scope="module")
def scales(exported: Exported) -> dict[str, float]:
    return calibrate(exported.network, exported.inputs, "int8")


@pytest.fixture(scope="module")
def files(exported: Exported, scales: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    found = {"int8": scales, "fp8": calibrate(exported.network, exported.inputs, "fp8")}
    for kind in KINDS:
        quantize_file(exported.file.path, folder / f"{kind}.onnx", kind, found[kind])
    return {kind: folder / f"{kind}.onnx" for kind in KINDS}


def test_every_linear_layer_of_the_blocks_is_calibrated_and_nothing_else(
    exported: Exported, scales: dict[str, float]
) -> None:
    # Three blocks: query, key and value, and output of three attentions, and two layers of the feed-forward.
    assert len(scales) == 3 * (3 * 3 + 2) and scales.keys() == quantized_layers(exported.network).keys()
    assert all(0 < scale < 1 for scale in scales.values())
    assert not any("norm" in name or "final" in name or "embedding" in name for name in scales)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_file_is_valid_and_its_weights_are_low(
    exported: Exported, files: dict[Kind, Path], kind: Kind
) -> None:
    onnx.checker.check_model(onnx.load(files[kind]), full_check=True)
    graph = load(files[kind]).graph
    low = {
        name for name, value in graph.initializers.items() if name.endswith(".weight") and value.dtype in TYPES.values()
    }
    assert low == quantized_layers(exported.network).keys()
    products = [node for node in graph if node.op_type == "MatMul"]
    makers = [node.inputs[1].producer() for node in products if node.inputs[1] is not None]
    between = [node for node in makers if node is not None and node.op_type == "DequantizeLinear"]
    assert len(between) == len(low) < len(products), "attention's own products are left as they are"
    assert describe(files[kind]).coarsest == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_engine_is_near_and_no_row_depends_on_its_batch_mates(
    exported: Exported, files: dict[Kind, Path], kind: Kind
) -> None:
    engine, shapes = OnnxEngine(files[kind], threads=1), [exported.profile.opt]
    report = check_calls(TorchEngine(exported.network), engine, exported.inputs, shapes=shapes, precision=kind)
    assert 1e-2 < report.worst_call.relative_error < 0.15
    assert compare_rows(engine, exported.inputs, 0).max_abs_error < 1e-5


def test_a_scale_that_is_wrong_is_refused_by_parity(
    exported: Exported, scales: dict[str, float], tmp_path: Path
) -> None:
    wrong = scales | {"blocks.1.feed_forward.up.weight": scales["blocks.1.feed_forward.up.weight"] / 20}
    quantize_file(exported.file.path, tmp_path / "wrong.onnx", "int8", wrong)
    engine, shapes = OnnxEngine(tmp_path / "wrong.onnx", threads=1), [exported.profile.opt]
    report = check_calls(TorchEngine(exported.network), engine, exported.inputs, shapes=shapes, precision="int8")
    with pytest.raises(ParityFailed, match="int8 allows"):
        report.require_passed()


def test_quantized_weights_are_not_replaced(exported: Exported, files: dict[Kind, Path], tmp_path: Path) -> None:
    weights = exported.network.state_dict()
    with pytest.raises(EngineMismatch, match="is quantized and cannot be replaced; export anew"):
        OnnxEngine(files["int8"], threads=1).with_weights(weights)
    with pytest.raises(EngineMismatch, match="is quantized and cannot be replaced; export anew"):
        write_refitted(files["int8"], tmp_path / "refitted.onnx", weights, {})


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_tensorrt_rtx_builds_a_quantized_graph(exported: Exported, files: dict[Kind, Path], kind: Kind) -> None:
    options = BuildOptions(architectures=("sm89",), optimization_level=0)
    ranges = exported.profile.ranges(exported.recipe)[:1]
    built = build_plan(files[kind], exported.profile, ranges, library="tensorrt_rtx", options=options)
    assert {each.dtype for each in built.inputs} == {"FLOAT", "BOOL"} and built.outputs[0].dtype == "FLOAT"
    assert built.warnings == () and not malformed(built.plan, "tensorrt_rtx")
