"""Frozen per-frame codecs between pixels and latents: patch PCA (fitted in a second) and diffusers' AutoencoderKL.

They own the latent scale: what `encode` returns has about zero mean and unit variance, so the flow starts from plain
normal noise. They know nothing of time (every frame is coded alone), of the network, or of where weights are stored.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from model.config import VaeConfig

WEIGHTS = "codec.safetensors"
HEADER = "codec.json"
FIT_CHUNK = 64
"""Frames whose patches are in memory at once while PCA is fitted."""
DEAD_CHANNEL = 1e-5
"""A component that deviates less, in patches of values in [-1, 1], carries float32 rounding, not content."""

Metadata = Mapping[str, float | str]


class FrameCodec(Protocol):
    """Pixels to latents and back. Both directions keep [B, T] and code each frame alone."""

    codec_type: ClassVar[str]
    """The recipe's `vae.type`."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def spatial_factor(self) -> int: ...

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W] in [-1, 1] -> latents [B, T, C, H / f, W / f] of about unit scale."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> frames [B, T, 3, h f, w f], clamped to [-1, 1]."""
        ...

    def save(self, folder: Path, metadata: Metadata | None = None) -> None:
        """Write `codec.safetensors` and `codec.json`, which `load_codec` reads back."""
        ...

    def to(self, device: torch.device | str, /) -> Self: ...


class PatchPca(nn.Module):
    """Principal components of non-overlapping f x f RGB patches: orthonormal, reversible up to the dropped components.

    Channel c is `components[c] @ (patch - mean) / scale[c]` with `scale = std ** power`, times one constant that makes
    the mean variance of all channels 1. Power 1 whitens: the flow loss then weighs a faint texture channel as much as
    brightness. Power 0 is one global scale: the loss follows pixel error, and late channels drown in the noise.
    """

    codec_type: ClassVar[str] = "patch_pca"
    mean: Tensor
    components: Tensor
    scale: Tensor

    def __init__(self, latent_channels: int, spatial_factor: int, power: float = 1.0) -> None:
        super().__init__()
        size = 3 * spatial_factor**2
        if not 1 <= latent_channels <= size:
            raise ValueError(
                f"latent_channels {latent_channels} must be from 1 to {size}, the values of a"
                f" {spatial_factor}x{spatial_factor} RGB patch"
            )
        self.latent_channels = latent_channels
        self.spatial_factor = spatial_factor
        self.power = power
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("components", torch.eye(size)[:latent_channels].clone())
        self.register_buffer("scale", torch.ones(latent_channels))

    @classmethod
    def fit(cls, frames: Tensor, latent_channels: int, spatial_factor: int, power: float = 1.0) -> Self:
        """Fit to frames [N, 3, H, W] or [B, T, 3, H, W] in [-1, 1]; the same frames give the same codec."""
        if not 0.0 <= power <= 1.0:
            raise ValueError(f"power {power} must be from 0 (one global scale) to 1 (every channel whitened)")
        codec = cls(latent_channels, spatial_factor, power)
        frames = frames.reshape(-1, *frames.shape[-3:])
        _require_frames(frames[None], spatial_factor)
        if frames.shape[0] == 0 or not frames.abs().amax() <= 1.0 + 1e-3:
            raise ValueError("patch PCA needs at least one frame, and every value finite and in [-1, 1]")
        mean, covariance = _moments(frames, spatial_factor)
        deviation, components = _principal(covariance, latent_channels)
        alive = int((deviation > DEAD_CHANNEL).sum())
        if alive < latent_channels:
            raise ValueError(
                f"the frames vary in {alive} directions of a {spatial_factor}x{spatial_factor} patch, fewer than the"
                f" {latent_channels} latent_channels asked for; fit on more varied frames or ask for at most {alive}"
            )
        scale = deviation**power
        codec.mean.copy_(mean)
        codec.components.copy_(components)
        codec.scale.copy_(scale * (deviation / scale).square().mean().sqrt())
        return codec

    def encode(self, frames: Tensor) -> Tensor:
        _require_frames(frames, self.spatial_factor)
        patches = F.pixel_unshuffle(frames, self.spatial_factor)  # [B, T, 3 f f, h, w]
        weight = self.components / self.scale[:, None]
        return torch.einsum("btphw,cp->btchw", patches - self.mean[:, None, None], weight)

    def decode(self, latents: Tensor) -> Tensor:
        _require_latents(latents, self.latent_channels)
        weight = self.components * self.scale[:, None]
        patches = torch.einsum("btchw,cp->btphw", latents, weight) + self.mean[:, None, None]
        return F.pixel_shuffle(patches, self.spatial_factor).clamp(-1.0, 1.0)

    def save(self, folder: Path, metadata: Metadata | None = None) -> None:
        _write(folder, self, {"power": self.power}, metadata)


class AutoencoderKlCodec(nn.Module):
    """diffusers' AutoencoderKL, frozen: the posterior's mean, normalised by the figures of its own config."""

    codec_type: ClassVar[str] = "autoencoder_kl"
    offset: Tensor
    factor: Tensor

    def __init__(self, network: Any, frames_per_chunk: int = 8) -> None:
        """`network` is an AutoencoderKL; `frames_per_chunk` bounds memory: so many frames pass it at once."""
        super().__init__()
        self.settings = _plain(network.config)
        self.latent_channels = cast(int, self.settings["latent_channels"])
        self.spatial_factor = 2 ** (len(cast(list[int], self.settings["block_out_channels"])) - 1)
        self.frames_per_chunk = frames_per_chunk
        self.network: Any = network.eval().requires_grad_(False)
        # Never saved: they follow from the settings, which are.
        offset, factor = _normalisation(self.settings)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("factor", factor, persistent=False)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Read the sd-vae-ft-ema layout: `config.json` and `diffusion_pytorch_model.safetensors`. Never a pickle."""
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} has no {name}; vae.path must be a folder of a diffusers AutoencoderKL saved with"
                    " safe_serialization=True (pickled .bin weights are refused)"
                )
        how = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
        try:
            network, info = _autoencoder_kl().from_pretrained(folder, output_loading_info=True, **how)
        except OSError as error:
            raise ValueError(f"{folder} cannot be read as an AutoencoderKL, copy it again: {error}") from None
        if info["missing_keys"]:
            raise ValueError(f"{folder}: the weights lack {info['missing_keys'][:3]}, which config.json calls for")
        return cls(network)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        _require_frames(frames, self.spatial_factor)
        chunks = torch.split(frames.flatten(0, 1), self.frames_per_chunk)
        raw = torch.cat([self.network.encode(chunk).latent_dist.mean for chunk in chunks])
        return ((raw - self.offset) * self.factor).reshape(*frames.shape[:2], *raw.shape[1:])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        _require_latents(latents, self.latent_channels)
        chunks = torch.split(latents.flatten(0, 1) / self.factor + self.offset, self.frames_per_chunk)
        frames = torch.cat([self.network.decode(chunk).sample for chunk in chunks])
        return frames.clamp(-1.0, 1.0).reshape(*latents.shape[:2], *frames.shape[1:])

    def save(self, folder: Path, metadata: Metadata | None = None) -> None:
        _write(folder, self, {"autoencoder": self.settings}, metadata)


def load_codec(folder: Path, config: VaeConfig) -> FrameCodec:
    """The codec a folder holds, checked against its digest and against the recipe.

    An `autoencoder_kl` comes from the folder's own copy where it has one (an engine bundle is complete in itself),
    else from `config.path`.
    """
    if config.type == "autoencoder_kl" and not (folder / HEADER).exists():
        assert config.path is not None  # held by VaeConfig
        codec: PatchPca | AutoencoderKlCodec = AutoencoderKlCodec.from_pretrained(Path(config.path))
    else:
        codec = _read(folder, config)
    _require_same("latent_channels", config.latent_channels, codec.latent_channels, folder)
    _require_same("spatial_factor", config.spatial_factor, codec.spatial_factor, folder)
    return codec


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of frames in [-1, 1]; infinite where they are equal, NaN where one is."""
    if a.shape != b.shape:
        raise ValueError(f"psnr compares equal shapes, not {tuple(a.shape)} and {tuple(b.shape)}")
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10.0 * math.log10(4.0 / error)


def _moments(frames: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Mean [P] and covariance [P, P] of all patches, summed in float64."""
    size = 3 * factor**2
    total = torch.zeros(size, dtype=torch.float64, device=frames.device)
    products = torch.zeros(size, size, dtype=torch.float64, device=frames.device)
    count = 0
    for chunk in torch.split(frames, FIT_CHUNK):
        patches = F.pixel_unshuffle(chunk.double(), factor).movedim(1, -1).flatten(0, 2)
        total += patches.sum(0)
        products += patches.T @ patches
        count += len(patches)
    mean = total / count
    return mean, products / count - torch.outer(mean, mean)


def _principal(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Deviations [C] and orthonormal directions [C, P] of the first components, largest first."""
    eigh = cast(Callable[[Tensor], tuple[Tensor, Tensor]], torch.linalg.eigh)  # pyright: ignore[reportUnknownMemberType]
    variance, vectors = eigh(covariance)
    deviation = variance.flip(0)[:count].clamp_min(0.0).sqrt()
    components = vectors.T.flip(0)[:count]
    # An eigenvector has no sign of its own: the largest entry is made positive, so a refit gives the same codec.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return deviation, components * largest.sign()


def _normalisation(settings: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """Offset and factor [C, 1, 1] of `latents = (raw - offset) * factor`, as diffusers' pipelines apply them."""
    channels = cast(int, settings["latent_channels"])
    offset = settings.get("latents_mean") or [settings.get("shift_factor") or 0.0] * channels
    deviation = settings.get("latents_std") or [1.0] * channels
    factor = cast(float, settings["scaling_factor"]) / torch.tensor(cast("list[float]", deviation))
    return torch.tensor(cast("list[float]", offset))[:, None, None], factor[:, None, None]


def _plain(settings: Mapping[str, object]) -> dict[str, object]:
    """diffusers' config without its private keys, as JSON gives it back (lists, no tuples)."""
    return json.loads(json.dumps({key: value for key, value in settings.items() if not key.startswith("_")}))


def _autoencoder_kl() -> Any:
    """diffusers' class, imported only where one is built: the import costs seconds."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL


def _require_frames(frames: Tensor, factor: int) -> None:
    if frames.ndim != 5 or frames.shape[2] != 3:
        raise ValueError(f"frames must be [B, T, 3, H, W], not {tuple(frames.shape)}")
    height, width = frames.shape[3:]
    if height % factor or width % factor:
        raise ValueError(
            f"frames of height {height} and width {width} do not divide by the codec's spatial_factor {factor};"
            " crop or pad them to a multiple"
        )


def _require_latents(latents: Tensor, channels: int) -> None:
    if latents.ndim != 5 or latents.shape[2] != channels:
        raise ValueError(f"latents must be [B, T, {channels}, h, w], not {tuple(latents.shape)}")


def _require_same(name: str, wanted: object, found: object, folder: Path) -> None:
    if wanted != found:
        raise ValueError(
            f"the recipe says vae.{name} {wanted!r}, but the codec in {folder} has {found!r};"
            " use the codec this recipe was trained with, or change the recipe"
        )


def _write(folder: Path, codec: FrameCodec, settings: Mapping[str, object], metadata: Metadata | None) -> None:
    state = cast(nn.Module, codec).state_dict()
    weights = save_tensors({name: value.detach().cpu().contiguous() for name, value in state.items()})
    header = {
        "type": codec.codec_type,
        "latent_channels": codec.latent_channels,
        "spatial_factor": codec.spatial_factor,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "metadata": dict(metadata or {}),
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights)
    # Last: a header without its weights, or with torn ones, never passes the digest.
    (folder / HEADER).write_text(json.dumps(header, indent=2, sort_keys=True))


def _read(folder: Path, config: VaeConfig) -> PatchPca | AutoencoderKlCodec:
    header = _read_header(folder)
    _require_same("type", config.type, header.get("type"), folder)
    codec = _empty(folder, header)
    try:
        codec.load_state_dict(_read_weights(folder, header), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {HEADER} beside it: {error}") from None
    return codec.eval()


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {HEADER}; fit a codec and save it there first") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON: the file is damaged; copy the codec again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a JSON object: the file is damaged; copy the codec again")
    return cast("dict[str, Any]", header)


def _empty(folder: Path, header: Mapping[str, Any]) -> PatchPca | AutoencoderKlCodec:
    """A codec of the header's shape, its weights still to come."""
    try:
        if header["type"] == "patch_pca":
            return PatchPca(header["latent_channels"], header["spatial_factor"], header["power"])
        return AutoencoderKlCodec(_autoencoder_kl().from_config(header["autoencoder"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / HEADER} does not describe a codec: {error!r}; copy the codec again") from None


def _read_weights(folder: Path, header: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{folder} has {HEADER} but no {WEIGHTS}; copy the codec again") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != header.get("sha256"):
        raise ValueError(f"{path} has sha256 {digest}, but {HEADER} says {header.get('sha256')}: copy the codec again")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is not safetensors: {error}") from None
