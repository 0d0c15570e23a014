"""What is exported is what is served: an engine bundle, loaded and driven like the network it came from."""

from pathlib import Path

import pytest
import torch

from export.bundle import write_bundle
from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import EngineCorrupt
from export.engines.torch import TorchEngine
from export.onnx import export_onnx
from export.parity.check import check_calls
from export.parity.inputs import ParityInputs
from infra.serving.limits import ServingLimits
from infra.serving.pipeline import VideoPipeline
from infra.serving.server import make_server
from model.text import load_text_encoder
from tests.tiny_server import image, request, tiny_pipeline, tiny_recipe, tiny_settings


@pytest.fixture(scope="module")
def original() -> VideoPipeline:
    recipe = tiny_recipe()
    return tiny_pipeline(recipe, load_text_encoder(recipe.text))


@pytest.fixture(scope="module")
def bundle(original: VideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    engine = original.engine
    assert isinstance(engine, TorchEngine)
    exported = export_onnx(engine.network, folder / "model.onnx", recipe=original.recipe)
    profile = exported.profile
    inputs = ParityInputs(profile, original.recipe, original.codec, original.text_encoder)
    shapes = [profile.min, profile.opt]
    parity = check_calls(engine, OnnxEngine(exported.path), inputs, shapes=shapes, subject=exported.sha256)
    write_bundle(folder / "bundle", model=exported.path, codec=original.codec, recipe=original.recipe, parity=parity)
    return folder / "bundle"


def test_a_loaded_bundle_makes_the_videos_of_the_network(original: VideoPipeline, bundle: Path) -> None:
    served = VideoPipeline.load(bundle)
    latents: list[list[torch.Tensor]] = []
    for pipeline in (original, served):
        rows = [
            pipeline.prepare("text", request(), {}),
            pipeline.prepare(
                "image", request("a blue square moves up", seed=8, guidance_scale=5.0), {"image": image()}
            ),
        ]
        while not rows[0].done:
            pipeline.advance(rows)
        latents.append([row.latents for row in rows])
    for wanted, found in zip(*latents, strict=True):
        assert (wanted - found).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))


def test_the_engines_profile_bounds_what_is_served(bundle: Path, tmp_path: Path) -> None:
    pipeline = VideoPipeline.load(bundle)
    assert pipeline.profile is not None
    limits = ServingLimits.of(pipeline.recipe, pipeline.profile)
    assert (limits.max_width, limits.max_height, limits.max_pixels, limits.max_frames) == (128, 128, 4096, 32)
    largest = pipeline.profile.max.batch // 2
    with pytest.raises(ValueError, match=f"max_rows {largest + 1} takes .* use at most {largest}"):
        make_server(tiny_settings(tmp_path, max_rows=largest + 1), pipeline)


def test_a_damaged_bundle_is_not_served(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineCorrupt, match="not an engine bundle"):
        VideoPipeline.load(tmp_path)
    for path in bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = bytearray((tmp_path / "model.onnx").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(weights)
    with pytest.raises(EngineCorrupt, match=r"model\.onnx has"):
        VideoPipeline.load(tmp_path)
