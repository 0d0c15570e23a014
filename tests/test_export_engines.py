"""Engines: two of them draw one video, and each refuses what it was not proven for."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from export.engines.fusions import fuse
from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import EngineCorrupt, EngineMismatch
from export.engines.torch import TorchEngine
from model.conditioning import Conditions
from model.config import SamplingConfig
from model.sampler import Guidance, no_image, sample_steps
from tests.tiny_export import TEXT, Exported


def test_both_engines_draw_the_same_video(exported: Exported) -> None:
    shape = exported.profile.opt
    noise, _, conditions = exported.inputs.call(shape, seed=3)
    _, _, null = exported.inputs.call(shape, seed=4)
    guidance = Guidance(conditions, null, torch.tensor([2.0, 5.0]), renormalize=True)
    config = SamplingConfig(num_steps=3, stochastic=False)
    expected, found = (
        list(sample_steps(engine.denoise, noise, guidance, no_image(noise), config, shift=1.0))[-1]
        for engine in (TorchEngine(exported.network), exported.engine)
    )
    assert (expected - noise).std() > 0.1
    assert torch.allclose(expected, found, atol=1e-4)


def test_on_a_cpu_norms_and_turns_are_operators_of_the_runtime(exported: Exported) -> None:
    graph = onnx.load(exported.file.path)
    standard, fused = (Counter(node.op_type for node in each.graph.node) for each in (graph, fuse(graph)))
    # Queries and keys of three attentions in three blocks; RoPE in two of the three.
    assert fused["SimplifiedLayerNormalization"] == 3 * 3 * 2 and fused["RotaryEmbedding"] == 3 * 2 * 2
    assert fused["Sub"] == fused["Reciprocal"] == 0 and standard["Reciprocal"] == 18
    assert {each.domain for each in graph.opset_import} == {""}, "the file itself is standard ONNX"


def test_a_torch_engine_keeps_no_graph_for_gradients(exported: Exported) -> None:
    inputs = exported.inputs.call(exported.profile.min, seed=0)
    assert not TorchEngine(exported.network).denoise(*inputs).requires_grad


def test_padding_of_the_text_and_batch_mates_change_nothing(exported: Exported) -> None:
    latents, timestep, conditions = exported.inputs.call(exported.profile.opt, seed=0)
    one = conditions.rows(slice(1, 2))
    longer = Conditions(
        torch.cat([one.text, torch.full((1, 4, TEXT), 9.0)], dim=1),
        torch.cat([one.text_mask, torch.zeros(1, 4, dtype=torch.bool)], dim=1),
        one.pooled,
        one.micro,
    )
    together = exported.engine.denoise(latents, timestep, conditions)[1:]
    assert torch.allclose(together, exported.engine.denoise(latents[1:], timestep[1:], longer), atol=1e-5)


def test_an_engine_refuses_what_it_was_not_proven_for(exported: Exported) -> None:
    latents, timestep, conditions = exported.inputs.call(exported.profile.opt, seed=0)
    denoise = exported.engine.denoise
    with pytest.raises(ValueError, match="frames 7 of the latents is not a multiple"):
        denoise(latents[:, :7], timestep, conditions)
    with pytest.raises(ValueError, match="batch 34 is outside the engine's profile, 1 to 32"):
        denoise(latents[:1].expand(34, -1, -1, -1, -1), timestep, conditions)
    with pytest.raises(ValueError, match=r"pooled has shape \(2, 19\), this engine takes \(2, 20\)"):
        denoise(latents, timestep, replace(conditions, pooled=conditions.pooled[:, :19]))
    with pytest.raises(ValueError, match=r"timestep is torch\.float64, this engine takes torch\.float32"):
        denoise(latents, timestep.double(), conditions)
    with pytest.raises(ValueError, match="text_mask is all False"):
        denoise(latents, timestep, replace(conditions, text_mask=torch.zeros_like(conditions.text_mask)))
    with pytest.raises(ValueError, match=r"must be \[B, T, C, H, W\]"):
        denoise(latents[0], timestep, conditions)


def test_a_file_that_is_no_engine_is_refused(tmp_path: Path, exported: Exported) -> None:
    with pytest.raises(ValueError, match="no such file; export a checkpoint to it"):
        OnnxEngine(tmp_path / "absent.onnx")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(exported.file.path.read_bytes()[:-1000])
    with pytest.raises(EngineCorrupt, match="cannot be loaded, export it again"):
        OnnxEngine(cut)
    foreign = onnx.load(exported.file.path)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(EngineMismatch, match="it was not written by export_onnx"):
        OnnxEngine(tmp_path / "foreign.onnx")


def test_importing_the_room_brings_in_no_exporter_and_no_runtime() -> None:
    heavy = "{'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'torch._dynamo', 'tensorrt', 'tensorrt_rtx'}"
    program = (
        f"import sys, export.bundle, export.parity.check, export.tensorrt; print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
