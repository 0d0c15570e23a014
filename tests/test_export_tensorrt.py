"""TensorRT plans: the refusals everywhere, and a real build where the RTX builder is installed (it needs no GPU)."""

import importlib.util
from pathlib import Path

import pytest
import torch

from export.onnx import export_onnx
from export.profiles import ShapeProfile
from export.tensorrt import BuildFailed, build_plan
from model.network.stiv import STIV
from model.recipe import StageRecipe


@pytest.fixture
def network() -> STIV:
    torch.manual_seed(0)
    return STIV(recipe().network, latent_channels=6, text_size=24, pooled_size=20)


@pytest.fixture
def profile(network: STIV) -> ShapeProfile:
    return ShapeProfile.of(recipe(), network, max_batch=8, stretch=2)


def recipe() -> StageRecipe:
    return StageRecipe.model_validate(
        {
            "name": "tiny",
            "task": "ti2v",
            "network": {"hidden_size": 32, "depth": 2, "num_heads": 2, "unmasked_depth": 1},
            "video": {"num_frames": 8, "height": 32, "width": 32},
            "vae": {"latent_channels": 6, "spatial_factor": 4},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "gate": [{"metric": "loss", "op": "<", "bound": 1.0}],
        }
    )


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed here")
def test_a_library_that_is_not_installed_is_named_with_its_package(profile: ShapeProfile, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensorrt cannot be imported \(.*\); pip install tensorrt"):
        build_plan(tmp_path / "model.onnx", profile, library="tensorrt")


def test_a_real_plan_is_built_without_a_gpu(network: STIV, profile: ShapeProfile, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    file = export_onnx(network, tmp_path / "model.onnx", recipe=recipe(), profile=profile)
    built = build_plan(file.path, profile, library="tensorrt_rtx", architectures=["sm89"])
    assert len(built.plan) > 100_000
    assert built.library == "tensorrt_rtx" and built.version and built.architectures == ("sm89",)
    assert not [line for line in built.log if line.startswith("error")]


def test_what_the_rtx_builder_cannot_do_is_said(profile: ShapeProfile, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(BuildFailed, match=r"tensorrt_rtx cannot read .*model\.onnx"):
        build_plan(broken, profile, library="tensorrt_rtx", architectures=["sm89"])
