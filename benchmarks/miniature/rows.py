"""Rows: each a stage recipe, the base with what it changes, or another row's checkpoint drawn in another way.

It owns the sizes and which row grows from which; it knows nothing of how a row is run, nor of what is claimed of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from model.config import CorpusConfig
from model.network.flops import training_flops
from model.recipe import StageRecipe

SIDE = 24
LOW_SIDE = 16
FRAMES = 8
GRID = (SIDE // 8, SIDE // 8)
"""Tokens of a frame: 4 pixels a latent, 2 latents a token."""
TEXT_SIZE = 384
"""Of MiniLM's tokens and of its pooled vector."""
CAPTION_TOKENS = 8
"""Of 'a red circle moves right', with start and end."""
CORPUS = CorpusConfig(shapes=2400, heldout_shapes=192, size=SIDE, num_frames=FRAMES)

Sections = Mapping[str, Any]

BASE: Sections = {
    "network": {
        "hidden_size": 128,
        "depth": 3,
        "num_heads": 4,
        "unmasked_depth": 1,
        "positions": "rope_sinusoid",
    },
    "vae": {"latent_channels": 12, "spatial_factor": 4, "whitening": 0.25},
    "text": {"max_tokens": 32},
    "flow": {"logit_std": 1.4},
    "optimizer": {"lr": 4e-3, "warmup_steps": 20},
    "training": {"steps": 1, "mask_ratio": 0.0, "ema_decay": 0.99, "checkpoint_every": 100_000, "keep_checkpoints": 1},
    "sampling": {"solver": "euler", "stochastic": False, "num_steps": 20, "guidance_scale": 3.0},
    "evaluation": {"heldout_clips": 96, "sample_prompts": 96},
    "gate": [{"metric": "heldout_loss", "op": "<", "bound": 10}],
}
IMAGE: Sections = {
    "task": "t2i",
    "network": {"temporal_patch_size": 1, "temporal_attention": False},
    "video": {"num_frames": 1, "height": SIDE, "width": SIDE},
    "flow": {"shift": 3.0},
    "training": {"global_batch_size": 32, "micro_batch_size": 32},
}
VIDEO: Sections = {
    "task": "t2v",
    "network": {"temporal_patch_size": 2},
    "video": {"num_frames": FRAMES, "height": SIDE, "width": SIDE},
    "flow": {"shift": 4.0},
    "training": {"global_batch_size": 16, "micro_batch_size": 16},
}
IMAGE_TO_VIDEO: Sections = {
    "task": "ti2v",
    "parent": "t2v",
    "conditioning": {"image_dropout": 0.0},
    "optimizer": {"lr": 2.5e-3},
}
LOW: Sections = {"video": {"height": LOW_SIDE, "width": LOW_SIDE}}
"""The resolution before: 2 x 2 tokens a frame where others have 3 x 3."""

IMAGE_STEPS, VIDEO_STEPS, IMAGE_TO_VIDEO_STEPS = 600, 800, 350


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the tables."""

    name: str
    title: str
    sections: Sections
    """The recipe's tree."""
    drawn_from: str | None = None
    """Row whose checkpoint this one measures with other sampling, training none; `sections` are then that row's."""
    parents: tuple[str, ...] = field(default=())
    """Rows that must be there first."""

    def recipe(self, seed: int) -> StageRecipe:
        return StageRecipe.model_validate(merged(self.sections, {"training": {"seed": seed}}))

    @property
    def flops(self) -> float:
        """Of this row's own training, its parents' left out."""
        recipe = self.recipe(0)
        if self.drawn_from is not None:
            return 0.0
        video, factor = recipe.video, recipe.vae.spatial_factor
        latents = (video.num_frames, recipe.vae.latent_channels, video.height // factor, video.width // factor)

        def clip(mask: float, temporal: float) -> int:
            return training_flops(
                recipe.network,
                latents,
                CAPTION_TOKENS,
                mask,
                temporal_mask_ratio=temporal,
                text_size=TEXT_SIZE,
                pooled_size=TEXT_SIZE,
            )

        training = recipe.training
        masked = training.steps * clip(training.mask_ratio, training.temporal_mask_ratio)
        return float(training.global_batch_size * (masked + training.unmasked_steps * clip(0.0, 0.0)))


def codec_recipe() -> StageRecipe:
    """The clips that the codec of all rows is fitted to."""
    return StageRecipe.model_validate(merged(BASE, VIDEO, {"name": "codec"}))


def merged(*trees: Sections) -> dict[str, Any]:
    """Later trees win, key by key."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            below = result.get(key)
            both = isinstance(below, dict) and isinstance(value, Mapping)
            result[key] = merged(cast(Sections, below), cast(Sections, value)) if both else value
    return result
