"""Engines on an NVIDIA GPU: each runtime computes what the network does, and takes other weights."""

import copy
from pathlib import Path

import pytest
import torch

from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import Engine, RefittableEngine
from export.engines.targets import OnnxTarget, TensorRtTarget
from export.engines.tensorrt import TensorRtEngine
from export.engines.torch import TorchEngine
from export.parity.check import check_parity
from export.parity.inputs import ParityInputs
from export.quantize import Kind, calibrate, quantize_file
from export.tensorrt.builder import build_plan
from export.tensorrt.options import BuildOptions
from model.network.stiv import STIV
from tests.tiny_export import Exported, Trace, make_network, make_recipe

pytestmark = pytest.mark.gpu


def prove(exported: Exported, engine: Engine, network: STIV) -> None:
    assert check_parity(TorchEngine(network), engine, exported.inputs, subject="").passed


def prove_refit(exported: Exported, engine: RefittableEngine) -> None:
    retrained = make_network(exported.recipe, seed=1)
    inputs = exported.inputs.call(exported.profile.opt, seed=0)
    before = engine.denoise(*inputs)
    prove(exported, engine.with_weights(retrained.state_dict()), retrained)
    assert torch.equal(engine.denoise(*inputs), before)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_network_on_a_gpu_computes_what_it_does_on_the_cpu(exported: Exported, cuda_graphs: bool) -> None:
    engine = TorchEngine(copy.deepcopy(exported.network).cuda(), cuda_graphs=cuda_graphs)
    prove(exported, engine, exported.network)
    prove_refit(exported, engine)


def test_onnx_runtime_computes_on_the_gpu_it_was_asked_for(exported: Exported) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    engine = OnnxEngine(exported.file.path, target=OnnxTarget(runtime="onnx_runtime", provider="cuda"))
    prove(exported, engine, exported.network)
    prove_refit(exported, engine)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_plan_computes_what_the_network_does_and_takes_other_weights(exported: Exported, cuda_graphs: bool) -> None:
    pytest.importorskip("tensorrt")
    options = BuildOptions(weights="refit")
    ranges = exported.profile.ranges(exported.recipe)
    plan = build_plan(exported.file.path, exported.profile, ranges, library="tensorrt", options=options)
    target = TensorRtTarget(runtime="tensorrt", build=options, contexts=2, cuda_graphs=cuda_graphs)
    engine = TensorRtEngine(plan.plan, target, exported.profile)
    prove(exported, engine, exported.network)
    prove_refit(exported, engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"export": {"guidance_in_graph": True}},
        {"network": {"hidden_size": 32, "depth": 2, "num_heads": 2, "image_cross_attention": "linear"}},
    ],
)
def test_a_plan_takes_guidance_and_an_image_as_its_graph_does(trace: Trace, changes: dict[str, object]) -> None:
    pytest.importorskip("tensorrt")
    recipe = make_recipe(**changes)
    network = make_network(recipe)
    file = trace(network, recipe)
    plan = build_plan(file.path, file.profile, file.profile.ranges(recipe), library="tensorrt")
    engine = TensorRtEngine(plan.plan, TensorRtTarget(runtime="tensorrt"), file.profile)
    assert check_parity(TorchEngine(network), engine, ParityInputs(file.profile, recipe), subject="").passed


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_plan_computes_what_its_graph_does(exported: Exported, tmp_path: Path, kind: Kind) -> None:
    pytest.importorskip("tensorrt")
    path = tmp_path / "model.onnx"
    quantize_file(exported.file.path, path, kind, calibrate(exported.network, exported.inputs, kind))
    plan = build_plan(path, exported.profile, exported.profile.ranges(exported.recipe), library="tensorrt")
    engine = TensorRtEngine(plan.plan, TensorRtTarget(runtime="tensorrt"), exported.profile)
    check_parity(OnnxEngine(path), engine, exported.inputs, subject="", precision="fp16")
