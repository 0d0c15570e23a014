"""Engines on an NVIDIA GPU: each runtime computes what the network does, and takes other weights."""

import copy

import pytest
import torch

from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import Engine, RefittableEngine
from export.engines.targets import OnnxTarget, TensorRtTarget
from export.engines.tensorrt import TensorRtEngine
from export.engines.torch import TorchEngine
from export.parity.check import check_parity
from export.tensorrt.builder import build_plan
from export.tensorrt.options import BuildOptions
from model.network.stiv import STIV
from tests.tiny_export import Exported, make_network

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
