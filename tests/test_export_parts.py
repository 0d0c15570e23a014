"""Codec and text encoder as files: any batch, frames, size and text length, and what their modules compute."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from export.parity.parts import Run, check_part
from export.parity.report import ParityFailed
from export.parts import Part, decoder, encoder, export_part, text_encoder
from export.precision import TYPES, emulate, load
from model.config import Precision, TextConfig
from model.data.moving_shapes import generate
from model.generation import to_frames
from model.text import ClipEncoder, MiniLmEncoder, T5ClipEncoder
from model.vae import AutoencoderKlCodec, PatchPca
from tests.test_text import TEXTS, save_clip, save_t5
from tests.tiny_export import make_recipe

FRAMES = to_frames([clip.frames for clip in generate(3, num_frames=4, size=32, seed=0)])


def runner(path: Path) -> Run:
    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [torch.as_tensor(each) for each in session.run(None, {name: x.numpy() for name, x in given.items()})]

    return run


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKlCodec:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    settings = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    }
    return AutoencoderKlCodec(cast(Any, AutoencoderKL.from_config(settings)))


def sizes(x: Tensor) -> list[Tensor]:
    """All of `x` [B, T, C, H, W], and one of everything."""
    return [x, x[:1, :1, :, :4, :8]]


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_an_autoencoders_decoder_is_its_file(
    autoencoder: AutoencoderKlCodec, tmp_path: Path, precision: Precision
) -> None:
    part = decoder(autoencoder)
    file = export_part(part, tmp_path / "decoder.onnx", recipe=make_recipe(), precision=precision)
    model = onnx.load(file.path)
    onnx.checker.check_model(model, full_check=True)
    sizes_of = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    assert sizes_of == {"frames": ["batch", "frames", 3, "pixel_height", "pixel_width"]}
    path = file.path
    if precision != "fp32":
        convolutions = [node for node in load(path).graph if node.op_type == "Conv"]
        assert convolutions and all(node.outputs[0].dtype == TYPES[precision] for node in convolutions)
        path = tmp_path / "emulated.onnx"
        emulate(file.path, path)
    cases = [{"latents": latents} for latents in sizes(autoencoder.encode(FRAMES))]
    report = check_part(part, runner(path), cases, precision=precision)
    assert report.sizes[1]["latents"] == (1, 1, 4, 4, 8) and report.worst > 0


@pytest.mark.parametrize("side", ["decoder", pytest.param("encoder", marks=pytest.mark.slow)])
def test_patch_pca_is_its_file(tmp_path: Path, side: str) -> None:
    codec = PatchPca.fit(FRAMES, 6, 4)
    part = decoder(codec) if side == "decoder" else encoder(codec)
    file = export_part(part, tmp_path / "part.onnx", recipe=make_recipe())
    given = codec.encode(FRAMES) if side == "decoder" else FRAMES
    check_part(part, runner(file.path), [{next(iter(part.inputs)): x} for x in sizes(given)])
    assert {"stiv.part": side, "stiv.precision": "fp32"}.items() <= file.metadata.items()


def text_cases(encoder: MiniLmEncoder | ClipEncoder | T5ClipEncoder, part: Part) -> list[dict[str, Tensor]]:
    """Four texts of unlike lengths, one long text, and the empty one."""
    batches = [TEXTS, TEXTS[-1:], [""]]
    return [dict(zip(part.inputs, encoder.tokenize(texts), strict=True)) for texts in batches]


def test_a_clip_text_tower_is_its_file(tmp_path: Path) -> None:
    save_clip(tmp_path)
    clip = ClipEncoder(tmp_path, 77)
    part = text_encoder(clip)
    file = export_part(part, tmp_path / "text.onnx", recipe=make_recipe())
    check_part(part, runner(file.path), text_cases(clip, part))

    with torch.no_grad():  # and no other tower is
        for weight in clip.tower.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    with pytest.raises(ParityFailed, match=r"text_encoder: relative error .*, fp32 allows 4e-05"):
        check_part(part, runner(file.path), text_cases(clip, part))


@pytest.mark.slow
def test_t5_with_clip_is_its_file(tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    save_t5(tmp_path / "t5")
    both = T5ClipEncoder(tmp_path / "t5", ClipEncoder(tmp_path / "clip", 77), 77)
    part = text_encoder(both)
    file = export_part(part, tmp_path / "text.onnx", recipe=make_recipe())
    check_part(part, runner(file.path), text_cases(both, part))


@pytest.mark.slow
def test_the_real_minilm_is_its_file(tmp_path: Path) -> None:
    encoder = MiniLmEncoder(TextConfig().max_tokens)
    part = text_encoder(encoder)
    file = export_part(part, tmp_path / "text.onnx", recipe=make_recipe())
    assert file.bytes > 80e6
    check_part(part, runner(file.path), text_cases(encoder, part))
