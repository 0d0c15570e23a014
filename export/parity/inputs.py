"""What engines are compared on: seeded rows at every time, encoded clips with their captions where a codec is at hand.

It owns how rows and videos of a shape are made; it knows nothing of engines or of errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from export.profiles import Shape, ShapeProfile
from model.conditioning import Conditions, first_frames, replace_frames
from model.data import moving_shapes
from model.flow_matching import path
from model.generation import to_frames
from model.recipe import StageRecipe
from model.sampler import PASSES, Guidance, ImageCondition
from model.text import TextEmbedding, TextEncoder
from model.vae import FrameCodec

Call = tuple[Tensor, Tensor, Conditions]
SMALLEST_CLIP = 16
"""Pixels; moving shapes are not drawn smaller, so a smaller frame is a corner of one."""


@dataclass(slots=True, frozen=True)
class Videos:
    """What B videos are drawn from."""

    noise: Tensor
    guidance: Guidance
    image: ImageCondition


@dataclass(slots=True, frozen=True)
class ParityInputs:
    """Inputs of any shape in `profile`, as sampling with `recipe` meets them.

    With a codec and a text encoder: moving shapes, encoded, and their captions. Without: unit noise in their place,
    which shows as much of the arithmetic and less of what a user sees.
    """

    profile: ShapeProfile
    recipe: StageRecipe
    codec: FrameCodec | None = None
    text: TextEncoder | None = None

    def call(self, shape: Shape, seed: int) -> Call:
        """Latents, timestep and conditions of one call, no two rows alike: times over all of [0, 1), captions of many
        lengths, the first frame given in every other row."""
        generator = torch.Generator().manual_seed(seed)
        clean, conditions = self._rows(shape, seed)
        timestep = (torch.arange(shape.batch) + torch.rand(shape.batch, generator=generator)) / shape.batch
        timestep[0] = 0.0  # where every sampling starts
        noise = torch.randn(clean.shape, generator=generator)
        noisy, _ = path(self.recipe.flow, clean, noise, timestep)
        return replace_frames(noisy, clean, _given(shape)), timestep, conditions

    def videos(self, shape: Shape, seed: int) -> Videos:
        """As many videos as `shape` has rows for, no two alike: guided from 1 to twice the recipe's scale."""
        count = max(1, shape.batch // len(PASSES[self.recipe.sampling.guidance]))
        shape = shape.model_copy(update={"batch": count})
        clean, conditional = self._rows(shape, seed)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        scale = torch.linspace(1.0, 2 * self.recipe.sampling.guidance_scale, count + 2)[1:-1]
        guidance = Guidance(conditional, self._null(shape, conditional), scale)
        return Videos(noise, guidance, ImageCondition(clean, _given(shape), noise))

    def _rows(self, shape: Shape, seed: int) -> tuple[Tensor, Conditions]:
        """Clean latents and conditions."""
        if self.codec is None or self.text is None:
            generator = torch.Generator().manual_seed(seed)
            clean = torch.randn(self.profile.input_shapes(shape)["latents"], generator=generator)
            embedding = self._noise_text(shape, generator)
        else:
            factor = self.profile.spatial_factor
            height, width = shape.height * factor, shape.width * factor
            clips = _clips(self, shape, seed)
            clean = self.codec.encode(to_frames([clip.frames for clip in clips])[..., :height, :width])
            captions = _captions([clip.spec.caption for clip in clips], shape.text_tokens, self.text)
            embedding = _fitted(self.text.encode(captions), shape.text_tokens)
        conditions = Conditions.of(embedding, self._micro(shape))
        if self.profile.takes_image:
            conditions = conditions.with_image(clean[:, 0], _given(shape)[:, 0])
        return clean, conditions

    def _null(self, shape: Shape, conditional: Conditions) -> Conditions:
        """Conditions of the empty text."""
        if self.text is None:
            embedding = self._noise_text(shape, torch.Generator().manual_seed(shape.batch))
        else:
            embedding = _fitted(self.text.encode([""] * shape.batch), shape.text_tokens)
        return Conditions(
            embedding.tokens,
            embedding.mask,
            embedding.pooled,
            conditional.micro,
            conditional.image,
            conditional.image_given,
        )

    def _noise_text(self, shape: Shape, generator: torch.Generator) -> TextEmbedding:
        lengths = torch.randint(1, shape.text_tokens + 1, (shape.batch,), generator=generator)
        lengths[0] = shape.text_tokens
        mask = torch.arange(shape.text_tokens) < lengths[:, None]
        tokens = torch.randn(shape.batch, shape.text_tokens, self.profile.text_size, generator=generator)
        pooled = torch.randn(shape.batch, self.profile.pooled_size, generator=generator)
        return TextEmbedding(tokens * mask[:, :, None], mask, pooled)

    def _micro(self, shape: Shape) -> Tensor:
        factor = self.profile.spatial_factor
        video = self.recipe.video
        row = [shape.height * factor, shape.width * factor, 0, 0, video.frame_stride, shape.frames]
        return torch.tensor([row] * shape.batch, dtype=torch.float32)


def _clips(inputs: ParityInputs, shape: Shape, seed: int) -> list[moving_shapes.ShapeClip]:
    side = max(SMALLEST_CLIP, *(size * inputs.profile.spatial_factor for size in (shape.height, shape.width)))
    return list(moving_shapes.generate(shape.batch, num_frames=shape.frames, size=side, seed=seed))


def _given(shape: Shape) -> Tensor:
    """bool [B, T]: every other row keeps its first frame, unless that is all it has."""
    given = first_frames(shape.batch, shape.frames).clone()
    given[::2] = False
    return given & (shape.frames > 1)


def _captions(captions: Sequence[str], tokens: int, text: TextEncoder) -> list[str]:
    """The captions, the first of them made long enough to fill `tokens`."""
    parts = [captions[0]]
    for more in islice(cycle(captions), tokens):
        if text.count_tokens(" and ".join(parts)) >= tokens:
            break
        parts.append(more)
    return [" and ".join(parts), *captions[1:]]


def _fitted(embedding: TextEmbedding, length: int) -> TextEmbedding:
    """Cut or padded to `length` tokens."""
    missing = max(0, length - embedding.mask.shape[1])
    tokens = torch.nn.functional.pad(embedding.tokens[:, :length], (0, 0, 0, missing))
    return TextEmbedding(tokens, torch.nn.functional.pad(embedding.mask[:, :length], (0, missing)), embedding.pooled)
