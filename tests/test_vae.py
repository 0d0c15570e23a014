"""Frame codecs: patch PCA is exact up to dropped components, AutoencoderKL keeps its own scale, damage is refused."""

import json
import math
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import VaeConfig
from model.vae import AutoencoderKlCodec, PatchPca, load_codec, psnr


def smooth_frames(count: int = 48, side: int = 32) -> Tensor:
    """Pictures [1, N, 3, S, S] with large shapes and faint texture, as PCA expects them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 2 - 1
    fine = 0.03 * torch.randn(count, 3, side, side, generator=generator)
    return (F.interpolate(coarse, size=side, mode="bicubic") + fine).clamp(-1, 1)[None]


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return smooth_frames()


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    }
    network = cast(Any, AutoencoderKL.from_config(settings))
    folder = tmp_path_factory.mktemp("autoencoder")
    network.save_pretrained(folder)
    return folder


def kl_config(folder: Path, latent_channels: int = 4, spatial_factor: int = 2) -> VaeConfig:
    return VaeConfig(
        type="autoencoder_kl", latent_channels=latent_channels, spatial_factor=spatial_factor, path=str(folder)
    )


# Patch PCA


def test_all_components_lose_nothing(frames: Tensor) -> None:
    codec = PatchPca.fit(frames, latent_channels=48, spatial_factor=4)
    assert psnr(codec.decode(codec.encode(frames)), frames) > 60


def test_more_channels_keep_more(frames: Tensor) -> None:
    figures = []
    for channels in (1, 4, 8, 16, 32):
        codec = PatchPca.fit(frames, channels, 4)
        figures.append(psnr(codec.decode(codec.encode(frames)), frames))
    assert figures == sorted(figures)
    assert figures[-1] > figures[0] + 10


def test_latents_keep_batch_and_time_and_shrink_space(frames: Tensor) -> None:
    codec = PatchPca.fit(frames, 8, 4)
    clips = frames.reshape(4, 12, 3, 32, 32)
    latents = codec.encode(clips)
    assert latents.shape == (4, 12, 8, 8, 8)
    assert torch.equal(latents.flatten(0, 1), codec.encode(frames)[0])
    assert codec.decode(latents).shape == clips.shape


def test_fit_takes_frames_with_or_without_time(frames: Tensor) -> None:
    flat, clips = PatchPca.fit(frames[0], 6, 4), PatchPca.fit(frames.reshape(4, 12, 3, 32, 32), 6, 4)
    for name, value in flat.state_dict().items():
        assert torch.equal(value, clips.state_dict()[name])


def test_components_are_orthonormal(frames: Tensor) -> None:
    components = PatchPca.fit(frames, 12, 4).components
    assert torch.allclose(components @ components.T, torch.eye(12), atol=1e-5)


def test_full_whitening_gives_every_channel_unit_deviation(frames: Tensor) -> None:
    latents = PatchPca.fit(frames, 12, 4).encode(frames)
    assert torch.allclose(latents.mean((0, 1, 3, 4)), torch.zeros(12), atol=1e-3)
    assert torch.allclose(latents.std((0, 1, 3, 4)), torch.ones(12), atol=1e-2)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_mean_variance_is_one_at_every_power(frames: Tensor, power: float) -> None:
    codec = PatchPca.fit(frames, 12, 4, power=power)
    latents = codec.encode(frames)
    assert latents.square().mean().item() == pytest.approx(1.0, abs=1e-3)
    # What the power spreads is the channels' share, never what is kept of the picture.
    whitened = PatchPca.fit(frames, 12, 4)
    assert psnr(codec.decode(latents), whitened.decode(whitened.encode(frames))) > 60


def test_power_zero_is_one_global_scale_and_half_lies_between(frames: Tensor) -> None:
    spread = [PatchPca.fit(frames, 12, 4, power=p).encode(frames).std((0, 1, 3, 4)) for p in (0.0, 0.5, 1.0)]
    ratios = [float(s[0] / s[-1]) for s in spread]
    assert ratios[0] > ratios[1] > ratios[2] == pytest.approx(1.0, abs=1e-2)
    assert ratios[1] == pytest.approx(math.sqrt(ratios[0]), rel=1e-2)


def test_decode_stays_in_range(frames: Tensor) -> None:
    codec = PatchPca.fit(frames, 4, 4)
    decoded = codec.decode(100 * torch.randn(1, 2, 4, 3, 3))
    assert decoded.min() == -1
    assert decoded.max() == 1


def test_frames_that_do_not_divide_are_refused(frames: Tensor) -> None:
    codec = PatchPca.fit(frames, 4, 4)
    with pytest.raises(ValueError, match=r"height 30 and width 32 .* spatial_factor 4"):
        codec.encode(torch.zeros(1, 1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"height 32 and width 30 .* spatial_factor 4"):
        PatchPca.fit(torch.zeros(2, 3, 32, 30), 4, 4)


def test_wrong_axes_are_refused(frames: Tensor) -> None:
    codec = PatchPca.fit(frames, 4, 4)
    with pytest.raises(ValueError, match=r"\[B, T, 3, H, W\], not \(3, 8, 8\)"):
        codec.encode(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"\[B, T, 4, h, w\], not \(1, 1, 8, 2, 2\)"):
        codec.decode(torch.zeros(1, 1, 8, 2, 2))


def test_fit_refuses_what_it_cannot_span() -> None:
    flat = torch.full((4, 3, 8, 8), 0.3)
    with pytest.raises(ValueError, match=r"vary in 0 directions .* 4 latent_channels"):
        PatchPca.fit(flat, 4, 4)
    grey = torch.rand(16, 1, 8, 8).expand(-1, 3, -1, -1)
    with pytest.raises(ValueError, match=r"vary in 16 directions .* 20 latent_channels"):
        PatchPca.fit(grey, 20, 4)


@pytest.mark.parametrize("bad", [torch.full((2, 3, 8, 8), 200.0), torch.full((2, 3, 8, 8), math.nan)])
def test_fit_refuses_values_out_of_range(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"finite and in \[-1, 1\]"):
        PatchPca.fit(bad, 2, 4)


def test_fit_refuses_bad_settings(frames: Tensor) -> None:
    with pytest.raises(ValueError, match="latent_channels 49 must be from 1 to 48"):
        PatchPca.fit(frames, 49, 4)
    with pytest.raises(ValueError, match=r"power 1\.5 must be from 0"):
        PatchPca.fit(frames, 4, 4, power=1.5)


def test_saved_codec_is_the_same_to_the_bit(frames: Tensor, tmp_path: Path) -> None:
    codec = PatchPca.fit(frames, 8, 4, power=0.5)
    codec.save(tmp_path / "codec", {"psnr_db": 31.5, "fitted_on": "heldout"})
    loaded = load_codec(tmp_path / "codec", VaeConfig(latent_channels=8, spatial_factor=4))
    assert torch.equal(loaded.encode(frames), codec.encode(frames))
    assert torch.equal(loaded.decode(codec.encode(frames)), codec.decode(codec.encode(frames)))
    header = json.loads((tmp_path / "codec" / "codec.json").read_text())
    assert header["metadata"] == {"psnr_db": 31.5, "fitted_on": "heldout"}
    assert header["power"] == 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VaeConfig(latent_channels=4, spatial_factor=4), "vae.latent_channels 4, but the codec in .* has 8"),
        (VaeConfig(latent_channels=8, spatial_factor=8), "vae.spatial_factor 8, but the codec in .* has 4"),
        (
            VaeConfig(type="autoencoder_kl", latent_channels=8, spatial_factor=4, path="elsewhere"),
            "vae.type 'autoencoder_kl', but the codec in .* has 'patch_pca'",
        ),
    ],
)
def test_recipe_and_codec_must_agree(frames: Tensor, tmp_path: Path, config: VaeConfig, message: str) -> None:
    PatchPca.fit(frames, 8, 4).save(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_codec(tmp_path, config)


def test_one_flipped_byte_is_noticed(frames: Tensor, tmp_path: Path) -> None:
    PatchPca.fit(frames, 8, 4).save(tmp_path)
    path = tmp_path / "codec.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*sha256.*copy the codec again"):
        load_codec(tmp_path, VaeConfig(latent_channels=8, spatial_factor=4))


def test_weights_of_another_shape_are_refused(frames: Tensor, tmp_path: Path) -> None:
    PatchPca.fit(frames, 8, 4).save(tmp_path)
    header = json.loads((tmp_path / "codec.json").read_text())
    (tmp_path / "codec.json").write_text(json.dumps({**header, "latent_channels": 4}))
    with pytest.raises(ValueError, match=r"codec\.safetensors does not fit codec\.json"):
        load_codec(tmp_path, VaeConfig(latent_channels=4, spatial_factor=4))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("codec.json", None, "has no codec.json"),
        ("codec.json", b"\xff\xfe{", "is not JSON"),
        ("codec.json", b"[1]", "is not a JSON object"),
        ("codec.json", b'{"type": "patch_pca"}', "does not describe a codec"),
        ("codec.safetensors", None, "no codec.safetensors"),
    ],
)
def test_damaged_files_are_named(
    frames: Tensor, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    PatchPca.fit(frames, 8, 4).save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_codec(tmp_path, VaeConfig(latent_channels=8, spatial_factor=4))


# AutoencoderKL


def test_autoencoder_keeps_batch_and_time(autoencoder_folder: Path, tmp_path: Path) -> None:
    codec = load_codec(tmp_path, kl_config(autoencoder_folder))
    frames = torch.rand(2, 5, 3, 16, 8) * 2 - 1
    latents = codec.encode(frames)
    assert latents.shape == (2, 5, 4, 8, 4)
    decoded = codec.decode(latents)
    assert decoded.shape == frames.shape
    assert decoded.abs().max() <= 1
    assert not latents.requires_grad


def test_autoencoder_latents_are_the_scaled_posterior_mean(autoencoder_folder: Path) -> None:
    codec = AutoencoderKlCodec.from_pretrained(autoencoder_folder)
    frames = torch.rand(1, 3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = codec.network.encode(frames[0]).latent_dist.mean
        image = codec.network.decode(mean).sample
    assert torch.allclose(codec.encode(frames)[0], 0.5 * mean, atol=1e-6)
    assert torch.allclose(codec.decode(0.5 * mean[None])[0], image.clamp(-1, 1), atol=1e-5)


def test_autoencoder_applies_a_shift_and_channel_figures(autoencoder_folder: Path, tmp_path: Path) -> None:
    plain = AutoencoderKlCodec.from_pretrained(autoencoder_folder)
    settings = json.loads((autoencoder_folder / "config.json").read_text())
    weights = (autoencoder_folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    frames = torch.rand(1, 2, 3, 8, 8) * 2 - 1
    raw = plain.encode(frames) / 0.5
    for change, expected in (
        ({"shift_factor": 0.25}, (raw - 0.25) * 0.5),
        ({"latents_mean": [0.25] * 4, "latents_std": [2.0] * 4}, (raw - 0.25) * 0.5 / 2.0),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
        codec = AutoencoderKlCodec.from_pretrained(tmp_path)
        latents = codec.encode(frames)
        assert torch.allclose(latents, expected, atol=1e-5)
        assert torch.allclose(codec.decode(latents), plain.decode(plain.encode(frames)), atol=1e-5)


def test_chunks_change_nothing(autoencoder_folder: Path) -> None:
    whole = AutoencoderKlCodec.from_pretrained(autoencoder_folder)
    single = AutoencoderKlCodec(whole.network, frames_per_chunk=1)
    frames = torch.rand(2, 5, 3, 8, 8) * 2 - 1
    assert torch.allclose(whole.encode(frames), single.encode(frames), atol=1e-5)
    assert torch.allclose(whole.decode(whole.encode(frames)), single.decode(single.encode(frames)), atol=1e-5)


def test_saved_autoencoder_needs_its_first_folder_no_more(autoencoder_folder: Path, tmp_path: Path) -> None:
    codec = load_codec(tmp_path, kl_config(autoencoder_folder))
    codec.save(tmp_path)
    loaded = load_codec(tmp_path, kl_config(tmp_path / "gone"))
    frames = torch.rand(1, 2, 3, 8, 8) * 2 - 1
    assert torch.equal(loaded.encode(frames), codec.encode(frames))


def test_released_sd_vae_attention_names_load(autoencoder_folder: Path, tmp_path: Path) -> None:
    """sd-vae-ft-ema was saved before diffusers renamed its attention weights."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in load_file(autoencoder_folder / "diffusion_pytorch_model.safetensors").items():
        for new_part, old_part in old.items():
            name = name.replace(f"attentions.0.{new_part}.", f"attentions.0.{old_part}.")
        weights[name] = value
    assert "encoder.mid_block.attentions.0.query.weight" in weights
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((autoencoder_folder / "config.json").read_bytes())
    frames = torch.rand(1, 1, 3, 8, 8) * 2 - 1
    new = AutoencoderKlCodec.from_pretrained(autoencoder_folder)
    assert torch.equal(AutoencoderKlCodec.from_pretrained(tmp_path).encode(frames), new.encode(frames))


def test_autoencoder_and_recipe_must_agree(autoencoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vae.latent_channels 8, but the codec in .* has 4"):
        load_codec(tmp_path, kl_config(autoencoder_folder, latent_channels=8))
    with pytest.raises(ValueError, match=r"vae.spatial_factor 8, but the codec in .* has 2"):
        load_codec(tmp_path, kl_config(autoencoder_folder, spatial_factor=8))


def test_pickled_autoencoder_is_refused(autoencoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((autoencoder_folder / "config.json").read_bytes())
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + " has no .*safetensors.*refused"):
        load_codec(tmp_path, kl_config(tmp_path))


def test_missing_autoencoder_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "none")) + r" has no config\.json"):
        load_codec(tmp_path, kl_config(tmp_path / "none"))


@pytest.mark.parametrize("damage", ["truncated", "incomplete"])
def test_damaged_autoencoder_weights_are_refused(autoencoder_folder: Path, tmp_path: Path, damage: str) -> None:
    source, target = (folder / "diffusion_pytorch_model.safetensors" for folder in (autoencoder_folder, tmp_path))
    (tmp_path / "config.json").write_bytes((autoencoder_folder / "config.json").read_bytes())
    if damage == "truncated":
        target.write_bytes(source.read_bytes()[:-8])
    else:
        weights = load_file(source)
        del weights["encoder.conv_in.weight"]
        save_file(weights, target, metadata={"format": "pt"})
    message = "cannot be read" if damage == "truncated" else "lack .*encoder.conv_in.weight"
    with pytest.raises(ValueError, match=message):
        load_codec(tmp_path, kl_config(tmp_path))


def test_autoencoder_refuses_sizes_that_do_not_divide(autoencoder_folder: Path) -> None:
    codec = AutoencoderKlCodec.from_pretrained(autoencoder_folder)
    with pytest.raises(ValueError, match=r"height 9 and width 8 .* spatial_factor 2"):
        codec.encode(torch.zeros(1, 1, 3, 9, 8))


# PSNR


def test_psnr_counts_decibels_of_a_range_of_two() -> None:
    a = torch.zeros(1, 1, 3, 4, 4)
    assert psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)
    assert psnr(a, a) == math.inf
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(a, a[:, :, :1])
