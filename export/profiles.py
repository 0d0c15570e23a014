"""Shape profiles: which inputs an engine takes, derived from the stage's recipe.

It owns ranges, multiples and their messages, all in latent units; it knows nothing of ONNX, runtimes or pixels.
"""

from typing import Self

import torch

from model.config import Config, Positive
from model.network.stiv import MICRO_GROUPS, STIV
from model.recipe import StageRecipe

TYPES: dict[str, torch.dtype] = {
    **dict.fromkeys(("text_mask", "image_given", "frame_mask", "renormalize"), torch.bool),
    "passes": torch.int64,
}
"""Of inputs; those not named are float32, whatever the graph computes in."""
Clip = tuple[int, int, int]
"""Latent frames, height and width."""
AXES = ("batch", "frames", "height", "width", "text_tokens")


class Shape(Config):
    """The sizes of one call that may change: rows, latent frames, latent height and width, text length."""

    batch: Positive
    frames: Positive
    height: Positive
    width: Positive
    text_tokens: Positive

    def __str__(self) -> str:
        return f"batch {self.batch}, latents {self.frames}x{self.height}x{self.width}, {self.text_tokens} text tokens"


class ShapeRange(Config):
    """A box of shapes that a builder tunes for at once: one optimisation profile of an engine."""

    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Shape) -> bool:
        return all(getattr(self.min, axis) <= getattr(shape, axis) <= getattr(self.max, axis) for axis in AXES)


class ShapeProfile(Config):
    """An engine's shapes: the smallest, the usual and the largest, and the sizes that never change."""

    min: Shape
    opt: Shape
    max: Shape
    max_area: Positive
    """Height x width; a side may be longer than the usual one if the other is shorter."""
    frame_multiple: Positive
    side_multiple: Positive
    latent_channels: Positive
    text_size: Positive
    pooled_size: Positive
    spatial_factor: Positive
    """Pixels a latent covers; only the micro-conditions know pixels."""
    takes_image: bool = False
    """The first frame is an input of its own too, for cross-attention."""
    guided: bool = False
    """The graph combines the rows of a call as the guidance of each video says."""

    @classmethod
    def of(cls, recipe: StageRecipe, network: STIV, *, max_batch: int | None = None, stretch: int = 4) -> Self:
        """Room for the recipe's rows of a call and `stretch` times its frames and its area."""
        max_batch = max_batch or recipe.export.max_rows
        factor, tokens = recipe.vae.spatial_factor, recipe.text.max_tokens
        frame, side = recipe.network.temporal_patch_size, recipe.network.patch_size
        frames, height, width = _latents(recipe)
        buckets = [_latents(recipe.in_shape(bucket)) for bucket in recipe.data.buckets]
        high = [
            max(sizes) for sizes in zip((frames * stretch, height * stretch, width * stretch), *buckets, strict=True)
        ]
        largest = dict(zip(("frames", "height", "width"), high, strict=True))
        if recipe.network.learned_grid is not None:  # the table of positions ends there
            table = zip(largest, recipe.network.learned_grid, (frame, side, side), strict=True)
            largest = {axis: min(largest[axis], places * patch) for axis, places, patch in table}
        return cls(
            min=Shape(batch=1, frames=frame, height=side, width=side, text_tokens=1),
            opt=Shape(
                batch=min(2, max_batch), frames=frames, height=height, width=width, text_tokens=max(1, tokens // 4)
            ),
            max=Shape(batch=max_batch, text_tokens=tokens, **largest),
            max_area=max(height * width * stretch, *(tall * wide for _, tall, wide in buckets), 1),
            frame_multiple=frame,
            side_multiple=side,
            latent_channels=network.latent_channels,
            text_size=network.text_projection.hidden.in_features,
            pooled_size=network.pooled_projection.in_features,
            spatial_factor=factor,
            takes_image=network.image_tokens is not None,
            guided=recipe.export.guidance_in_graph,
        )

    def check(self, shape: Shape) -> None:
        """Refuse a shape outside the profile: nobody has shown that the engine is right there."""
        for axis in AXES:
            value, low, high = (int(getattr(x, axis)) for x in (shape, self.min, self.max))
            if not low <= value <= high:
                raise ValueError(
                    f"{axis} {value} is outside the engine's profile, {low} to {high}; ask for less, or export with a"
                    " wider profile"
                )
        patch = {"frames": self.frame_multiple, "height": self.side_multiple, "width": self.side_multiple}
        for axis, multiple in patch.items():
            value = int(getattr(shape, axis))
            if value % multiple:
                raise ValueError(f"{axis} {value} of the latents is not a multiple of the network's patch, {multiple}")
        if shape.height * shape.width > self.max_area:
            raise ValueError(
                f"height {shape.height} x width {shape.width} = {shape.height * shape.width} is above the engine's"
                f" {self.max_area}; ask for a smaller frame, or export with a wider profile"
            )

    def signature(self) -> dict[str, tuple[int | str, ...]]:
        """The sizes of every input of the graph, by its name and in its order; a size that may change by its axis."""
        inputs: dict[str, tuple[int | str, ...]] = {
            "latents": ("batch", "frames", self.latent_channels, "height", "width"),
            "timestep": ("batch",),
            "text": ("batch", "text_tokens", self.text_size),
            "text_mask": ("batch", "text_tokens"),
            "pooled": ("batch", self.pooled_size),
            "micro": ("batch", sum(MICRO_GROUPS)),
        }
        if self.takes_image:
            inputs |= {"image": ("batch", self.latent_channels, "height", "width"), "image_given": ("batch",)}
        if self.guided:
            inputs |= {"passes": ("batch", 3), "scales": ("batch", 2)}
            inputs |= {"frame_mask": ("batch", "frames"), "renormalize": ("batch",)}
        return inputs

    def input_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shape of every input of a call, by its name in the graph, in its order."""
        return {
            name: tuple(size if isinstance(size, int) else int(getattr(shape, size)) for size in sizes)
            for name, sizes in self.signature().items()
        }

    def corners(self) -> tuple[Shape, ...]:
        """Where an engine is proven: the smallest shape, the usual one, and each axis at its end."""
        low, opt, high = self.min, self.opt, self.max
        return (
            low,
            opt,
            opt.model_copy(update={"batch": high.batch}),
            opt.model_copy(update={"batch": 1, "frames": high.frames, "text_tokens": low.text_tokens}),
            opt.model_copy(update={"frames": low.frames, "height": high.height, "text_tokens": high.text_tokens}),
            opt.model_copy(update={"batch": 1, "frames": high.frames, "width": high.width}),
        )

    def ranges(self, recipe: StageRecipe) -> tuple[ShapeRange, ...]:
        """Boxes for a builder, best first: every shape the stage trains on by itself, then wide, square and tall ones.

        One box of all heights and all widths would hold areas far above `max_area`, and a builder plans memory for its
        largest corner.
        """
        exact = dict.fromkeys(
            [_latents(recipe), *(_latents(recipe.in_shape(bucket)) for bucket in recipe.data.buckets)]
        )
        usual = next(iter(exact))
        low = (self.min.frames, self.min.height, self.min.width)
        _, height, width = usual
        stretch = self.max_area // (height * width)
        side = max(1, round(stretch**0.5))
        open_ends = {(height, width * stretch), (height * side, width * (stretch // side)), (height * stretch, width)}
        wide_to_tall = [
            (self.max.frames, min(tall, self.max.height), min(wide, self.max.width)) for tall, wide in sorted(open_ends)
        ]
        return (
            *(self._box(clip, clip, clip) for clip in exact),
            *(self._box(low, usual, high) for high in wide_to_tall),
        )

    def _box(self, low: Clip, usual: Clip, high: Clip) -> ShapeRange:
        """All rows and texts of the profile, over `low` to `high` latents."""
        at = ((self.min, low), (self.opt, usual), (self.max, high))
        low_end, middle, high_end = (
            ends.model_copy(update={"frames": frames, "height": height, "width": width})
            for ends, (frames, height, width) in at
        )
        return ShapeRange(min=low_end, opt=middle, max=high_end)


def _latents(recipe: StageRecipe) -> Clip:
    video, factor = recipe.video, recipe.vae.spatial_factor
    return video.num_frames, video.height // factor, video.width // factor
