"""The phases of a stage's run and what a clip is in each: tokens, latents, operations.

It reads a recipe and knows nothing of ranks, layouts or machines.
"""

from dataclasses import dataclass
from functools import cached_property

from model.network.flops import ForwardFlops, forward_flops, kept
from model.recipe import StageRecipe

CLIP_WIDTH, T5_WIDTH, MINILM_WIDTH = 1280, 4096, 384
"""Of the paper's text tower (CLIP bigG), of T5-XXL and of MiniLM: a plan does not open the encoder a recipe names."""


@dataclass(frozen=True)
class Phase:
    """Steps of a stage that mask alike."""

    recipe: StageRecipe
    name: str
    steps: int
    mask_ratio: float
    temporal_mask_ratio: float

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Token frames and places a frame of a clip."""
        frames, rows, columns = self.recipe.token_grid
        return frames, rows * columns

    @cached_property
    def kept_grid(self) -> tuple[int, int]:
        """The same of what the masked blocks see."""
        frames, places = self.grid
        return kept(frames, self.temporal_mask_ratio), kept(places, self.mask_ratio)

    @cached_property
    def blocks(self) -> list[tuple[int, tuple[int, int]]]:
        """Blocks that see the kept tokens, then blocks that see all, each with its grid."""
        network = self.recipe.network
        last = network.unmasked_depth if self.masked else network.depth
        return [(network.depth - last, self.kept_grid), (last, self.grid)]

    @property
    def masked(self) -> bool:
        return self.kept_grid != self.grid

    @property
    def context(self) -> int:
        """What cross-attention looks at: the caption's tokens at their most, and the image's if it is seen so."""
        image = 0 if self.recipe.network.image_cross_attention == "off" else self.grid[1]
        return self.recipe.text.max_tokens + image

    @cached_property
    def flops(self) -> ForwardFlops:
        """Of one clip."""
        text, pooled = text_widths(self.recipe)
        return forward_flops(
            self.recipe.network,
            latents_of(self.recipe),
            self.recipe.text.max_tokens,
            self.mask_ratio,
            temporal_mask_ratio=self.temporal_mask_ratio,
            text_size=text,
            pooled_size=pooled,
        )


def phases(recipe: StageRecipe) -> list[Phase]:
    """The masked steps, then the unmasked ones; phases without steps, or alike, are left out."""
    training = recipe.training
    masked = Phase(recipe, "masked", training.steps, training.mask_ratio, training.temporal_mask_ratio)
    if not masked.masked:
        return [Phase(recipe, "unmasked", training.total_steps, 0.0, 0.0)]
    if not training.unmasked_steps:
        return [masked]
    return [masked, Phase(recipe, "unmasked", training.unmasked_steps, 0.0, 0.0)]


def latents_of(recipe: StageRecipe) -> tuple[int, int, int, int]:
    """Frames, channels, height and width of a clip's latents."""
    factor, video = recipe.vae.spatial_factor, recipe.video
    return video.num_frames, recipe.vae.latent_channels, video.height // factor, video.width // factor


def text_widths(recipe: StageRecipe) -> tuple[int, int]:
    """Of the text encoder's tokens and of its pooled vector."""
    if recipe.text.type == "minilm":
        return MINILM_WIDTH, MINILM_WIDTH
    return (T5_WIDTH if recipe.text.type == "t5_clip" else CLIP_WIDTH), CLIP_WIDTH
