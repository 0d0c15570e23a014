"""Latents on disk: a shard set encoded once by a frozen codec, so that no training step encodes it again.

It owns what is encoded and whether a stage can train on it; the format is `shards`', the arithmetic the codec's. Codecs
see single frames, so any frames of a clip can be taken from its latents. What is given up is the random place of a
crop: the middle of each picture is encoded, at one size.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from model.config import VideoConfig
from model.data.cut import middle_cut
from model.data.shard_writer import ShardWriter
from model.data.shards import LatentsOf, ShardSet
from model.generation import to_frames
from model.recipe import StageRecipe
from model.vae import HEADER, FrameCodec


def codec_digest(folder: Path) -> str:
    """What a set of latents calls the codec in `folder`: sha256 of its header, which names its weights."""
    return hashlib.sha256((folder / HEADER).read_bytes()).hexdigest()


def encode_shards(
    shards: ShardSet,
    folder: Path,
    codec: FrameCodec,
    of: LatentsOf,
    *,
    device: torch.device | str = "cpu",
    on_clip: Callable[[int], None] = lambda done: None,
) -> ShardSet:
    """Write every clip of `shards` as latents below `folder`, whole or not at all; `on_clip` is told clips done."""
    codec = codec.to(device)
    with ShardWriter(folder, latents=of) as writer:
        for position in range(len(shards)):
            sample = shards.sample(position)
            cut = middle_cut(sample, VideoConfig(num_frames=len(sample.frames), height=of.height, width=of.width))
            latents = codec.encode(to_frames([cut.clip]).to(device))[0]
            writer.write_latents(sample, latents.float().cpu().numpy(), top=cut.top, left=cut.left)
            on_clip(position + 1)
    return ShardSet(folder)


def require_fit(shards: ShardSet, recipe: StageRecipe, codec_folder: Path) -> None:
    """Refuse a set in another form than the recipe's, or latents of another codec or of another size."""
    of, form = shards.index.latents, recipe.data.form
    if (of is not None) != (form == "latents"):
        raise ValueError(
            f"{shards.folder} holds {'clips' if of is None else 'latents'}, stage '{recipe.name}' has data.form"
            f" '{form}'; change one of them"
        )
    if of is None:
        return
    size = (recipe.video.height, recipe.video.width)
    if (of.height, of.width) != size:
        raise ValueError(
            f"{shards.folder} holds latents of {of.height}x{of.width} pixels, stage '{recipe.name}' trains on"
            f" {size[0]}x{size[1]}; encode the data set at that size, or set data.form 'clips'"
        )
    codec = codec_digest(codec_folder)
    if of.codec != codec:
        raise ValueError(
            f"{shards.folder} holds latents of codec {of.codec[:16]}, stage '{recipe.name}' has {codec[:16]}; encode"
            " the data set with this codec, or set data.form 'clips'"
        )
