"""The frozen parts around the network as ONNX files of their own: codec decoder and encoder, text encoder.

It owns what goes into and comes out of each; it knows nothing of the network, of tokenizers or of runtimes.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from export.onnx import recipe_digest
from export.tracing import DTYPES, EXTERNAL_ABOVE, Sizes, file_digest, label, save, trace, weights_digest
from model.config import Precision
from model.recipe import StageRecipe
from model.vae import AutoencoderKlCodec, FrameCodec

logger = logging.getLogger(__name__)

OPSET = 22
"""The first in which a convolution may be bf16."""
PRODUCTS = (nn.Linear, nn.Conv2d, nn.Embedding)
"""Modules whose weights become low."""


class Tower(Protocol):
    """A text encoder whose tokenizer stays outside."""

    tower: nn.Module
    hidden_size: int
    pooled_size: int


@dataclass(slots=True, frozen=True)
class Part:
    """A module with its ends, ready to be traced."""

    name: str
    module: nn.Module
    example: Mapping[str, Tensor]
    """No size in it is 1 and no two are equal."""
    inputs: Sizes
    outputs: Sizes
    multiples: Mapping[str, int] = field(default_factory=dict[str, int])
    limits: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(slots=True, frozen=True)
class PartExport:
    """What was written."""

    path: Path
    sha256: str
    bytes: int
    seconds: float
    metadata: Mapping[str, str]


class _Decoder(nn.Module):
    def __init__(self, codec: FrameCodec) -> None:
        super().__init__()
        self.codec = cast(nn.Module, codec)

    def forward(self, latents: Tensor) -> Tensor:
        """The codec's own `decode`, all frames at once: one that works in chunks has no fixed number of them."""
        codec = self.codec
        if not isinstance(codec, AutoencoderKlCodec):
            return cast(FrameCodec, codec).decode(latents)
        frames = codec.network.decode(latents.flatten(0, 1) / codec.factor + codec.offset).sample
        return frames.clamp(-1.0, 1.0).unflatten(0, latents.shape[:2])


class _Encoder(nn.Module):
    def __init__(self, codec: FrameCodec) -> None:
        super().__init__()
        self.codec = cast(nn.Module, codec)

    def forward(self, frames: Tensor) -> Tensor:
        codec = self.codec
        if not isinstance(codec, AutoencoderKlCodec):
            return cast(FrameCodec, codec).encode(frames)
        raw = codec.network.encode(frames.flatten(0, 1)).latent_dist.mean
        return ((raw - codec.offset) * codec.factor).unflatten(0, frames.shape[:2])


def decoder(codec: FrameCodec) -> Part:
    """latents [B, T, C, h, w] -> frames [B, T, 3, h f, w f] in [-1, 1]."""
    channels = codec.latent_channels
    return Part(
        name="decoder",
        module=_Decoder(codec),
        example={"latents": torch.zeros(2, 3, channels, 5, 7)},
        inputs={"latents": ("batch", "frames", channels, "height", "width")},
        outputs={"frames": ("batch", "frames", 3, "pixel_height", "pixel_width")},
    )


def encoder(codec: FrameCodec) -> Part:
    """frames [B, T, 3, H, W] in [-1, 1] -> latents [B, T, C, H / f, W / f]."""
    factor = codec.spatial_factor
    return Part(
        name="encoder",
        module=_Encoder(codec),
        example={"frames": torch.zeros(2, 3, 3, 5 * factor, 7 * factor)},
        inputs={"frames": ("batch", "frames", 3, "pixel_height", "pixel_width")},
        outputs={"latents": ("batch", "frames", codec.latent_channels, "height", "width")},
        multiples={"pixel_height": factor, "pixel_width": factor},
    )


def text_encoder(text: Tower) -> Part:
    """ids int64 [B, L] and mask bool [B, L] -> tokens [B, L, D] and pooled [B, P]; T5 with CLIP takes two of each."""
    towers = dict(text.tower.named_children())
    inputs: dict[str, tuple[int | str, ...]] = {"ids": ("batch", "tokens"), "mask": ("batch", "tokens")}
    if "clip" in towers:
        inputs |= {"clip_ids": ("batch", "clip_tokens"), "clip_mask": ("batch", "clip_tokens")}
    lengths = {"batch": 2, "tokens": 5, "clip_tokens": 7}
    example = {
        name: torch.ones([lengths[str(axis)] for axis in axes], dtype=torch.bool if "mask" in name else torch.int64)
        for name, axes in inputs.items()
    }
    return Part(
        name="text_encoder",
        module=text.tower,
        example=example,
        inputs=inputs,
        outputs={"text": ("batch", "tokens", text.hidden_size), "pooled": ("batch", text.pooled_size)},
        limits=_positions("tokens", text.tower) | _positions("clip_tokens", towers.get("clip")),
    )


def _positions(axis: str, tower: object) -> dict[str, int]:
    """How long a text may be: T5 counts distances and has no end."""
    found = getattr(getattr(getattr(tower, "network", None), "config", None), "max_position_embeddings", None)
    return {} if found is None else {axis: int(found)}


def export_part(
    part: Part, path: Path, *, recipe: StageRecipe, precision: Precision = "fp32", external_above: int = EXTERNAL_ABOVE
) -> PartExport:
    """Write `part`, which belongs to `recipe`, to `path`; weights too large for it go to `path`.data."""
    from export import graph
    from export.precision import lower, tensor

    start = time.perf_counter()
    module = part.module.eval().requires_grad_(False)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in module.state_dict().items()}
    model = trace(
        module,
        part.example,
        part.inputs,
        outputs=list(part.outputs),
        multiples=part.multiples,
        limits=part.limits,
        opset=OPSET,
    )
    graph.tidy(model, weights.keys())
    used = {name: weight for name, weight in weights.items() if name in model.graph.initializers}
    low = _low_names(module)
    lower(model.graph, precision, low)
    typed = {name: weight.to(DTYPES[precision]) if name in low else weight for name, weight in used.items()}
    graph.fill(model.graph, {name: tensor(name, weight) for name, weight in typed.items()})
    metadata = {
        "stiv.part": part.name,
        "stiv.stage": recipe.name,
        "stiv.recipe_sha256": recipe_digest(recipe),
        "stiv.weights_sha256": weights_digest(used),
        "stiv.precision": precision,
    }
    label(model, part.name, metadata, part.inputs, part.outputs)
    size = save(model, path, external_above)
    seconds = time.perf_counter() - start
    logger.info("exported the %s to %s in %s: %.1f MB in %.1f s", part.name, path, precision, size / 1e6, seconds)
    return PartExport(path, file_digest(path), size, seconds, metadata)


def _low_names(module: nn.Module) -> set[str]:
    modules = cast(Iterable[tuple[str, nn.Module]], module.named_modules())
    return {
        f"{layer}.{name}"
        for layer, child in modules
        if isinstance(child, PRODUCTS)
        for name, _ in child.named_parameters(recurse=False)
    }
