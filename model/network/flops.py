"""What one clip costs: floating-point operations of the network, counted from its shape alone.

It counts matrix products and convolutions, a multiply-add as two, and nothing that is done element by element. It knows
nothing of kernels: causal attention's skipped half, and what a backward of attention computes again, are not in it.
"""

from dataclasses import dataclass

from model.config import NetworkConfig
from model.network.image import RESIDUAL_BLOCKS
from model.network.layers import ScalarEmbedder, modulation_vectors
from model.network.stiv import MICRO_GROUPS


@dataclass(slots=True, frozen=True)
class ForwardFlops:
    """Of one clip's forward pass, by what computes them."""

    ends: int
    """Before and after the blocks: embeddings, the condition, the head."""
    linear: int
    """The blocks' linear layers."""
    self_attention: int
    """Products of queries, keys and values in space and in time."""
    cross_attention: int

    @property
    def total(self) -> int:
        return self.ends + self.linear + self.self_attention + self.cross_attention

    @property
    def recomputed(self) -> int:
        """What activation checkpointing computes a second time: the blocks, but for self-attention's products."""
        return self.linear + self.cross_attention


def forward_flops(
    config: NetworkConfig,
    latents: tuple[int, int, int, int],
    text_tokens: int,
    mask_ratio: float = 0.0,
    *,
    temporal_mask_ratio: float = 0.0,
    text_size: int = 1280,
    pooled_size: int = 1280,
) -> ForwardFlops:
    """Of one clip.

    Args:
        latents: frames, channels, height and width of the clip's latents.
        text_tokens: of the caption, with its padding.
        mask_ratio: share of the spatial tokens that all but the last `unmasked_depth` blocks do not see;
            `temporal_mask_ratio` the same of the token frames.
        text_size: width of the text encoder's tokens, `pooled_size` of its pooled vector (CLIP bigG's, the paper's).
    """
    size = config.hidden_size
    frames, tokens = latents[0] // config.temporal_patch_size, _patches(config, latents)
    patch_values = config.temporal_patch_size * config.patch_size**2 * latents[1]
    image_tokens = 0 if config.image_cross_attention == "off" else tokens
    context = text_tokens + image_tokens

    ends = 2 * _linear(frames * tokens, patch_values, size)  # patch embedding and head
    ends += _linear(text_tokens, text_size, size) + _linear(text_tokens, size, size)
    ends += _condition(config, pooled_size)
    if image_tokens:
        ends += _image(config, latents)

    grids = [
        (config.depth - config.unmasked_depth, kept(frames, temporal_mask_ratio), kept(tokens, mask_ratio)),
        (config.unmasked_depth, frames, tokens),
    ]
    return ForwardFlops(
        ends=ends,
        linear=sum(blocks * _block_linear(config, seen * places, context) for blocks, seen, places in grids),
        self_attention=sum(blocks * _self_attention(config, seen, places) for blocks, seen, places in grids),
        cross_attention=sum(blocks * _attend(seen * places, context, size) for blocks, seen, places in grids),
    )


def training_flops(
    config: NetworkConfig,
    latents: tuple[int, int, int, int],
    text_tokens: int,
    mask_ratio: float = 0.0,
    *,
    temporal_mask_ratio: float = 0.0,
    text_size: int = 1280,
    pooled_size: int = 1280,
) -> int:
    """Of one clip forward and backward, which is taken for twice the forward; arguments as of `forward_flops`."""
    forward = forward_flops(
        config,
        latents,
        text_tokens,
        mask_ratio,
        temporal_mask_ratio=temporal_mask_ratio,
        text_size=text_size,
        pooled_size=pooled_size,
    )
    return 3 * forward.total


def kept(count: int, mask_ratio: float) -> int:
    """Of `count` tokens, or token frames, what stays; as `flow_matching` draws them."""
    return max(1, round(count * (1 - mask_ratio)))


def _block_linear(config: NetworkConfig, queries: int, context: int) -> int:
    size = config.hidden_size
    project = _linear(queries, size, size)
    attentions = (8 if config.temporal_attention else 4) * project
    cross = 2 * project + 2 * _linear(context, size, size)
    feed_forward = 2 * config.mlp_ratio * project
    modulation = 0 if config.shared_modulation else _linear(1, size, modulation_vectors(config) * size)
    return attentions + cross + feed_forward + modulation


def _self_attention(config: NetworkConfig, frames: int, tokens: int) -> int:
    keys = tokens + (frames if config.temporal_attention else 0)
    return _attend(frames * tokens, keys, config.hidden_size)


def _condition(config: NetworkConfig, pooled_size: int) -> int:
    """Embedders of the condition, the shared AdaLN and the final layer's."""
    size = config.hidden_size
    scalars = [1, *(MICRO_GROUPS if config.micro_conditions else [])]
    embedders = sum(
        _linear(1, count * 2 * ScalarEmbedder.FREQUENCIES, size) + _linear(1, size, size) for count in scalars
    )
    shared = _linear(1, size, modulation_vectors(config) * size) if config.shared_modulation else 0
    return embedders + _linear(1, pooled_size, size) + shared + _linear(1, size, 2 * size)


def _image(config: NetworkConfig, latents: tuple[int, int, int, int]) -> int:
    _, channels, height, width = latents
    if config.image_cross_attention == "linear":
        return _linear(_patches(config, latents), config.patch_size**2 * channels, config.hidden_size)
    inner = config.hidden_size // 4
    convolutions = 9 * _linear(height * width, channels, inner)
    convolutions += 2 * RESIDUAL_BLOCKS * 9 * _linear(height * width, inner, inner)
    return convolutions + _linear(_patches(config, latents), config.patch_size**2 * inner, config.hidden_size)


def _patches(config: NetworkConfig, latents: tuple[int, int, int, int]) -> int:
    """Spatial tokens of a frame."""
    return (latents[2] // config.patch_size) * (latents[3] // config.patch_size)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attend(queries: int, keys: int, size: int) -> int:
    """Logits and the weighted sum of values, over all heads."""
    return 2 * _linear(queries, size, keys)
