"""Shape profiles: which inputs an engine takes, derived from the stage's recipe.

It owns ranges, multiples and their messages, all in latent units; it knows nothing of ONNX, runtimes or pixels.
"""

from typing import Self

from model.config import Config, Positive
from model.network.stiv import MICRO_GROUPS, STIV
from model.recipe import StageRecipe

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

    @classmethod
    def of(cls, recipe: StageRecipe, network: STIV, *, max_batch: int = 32, stretch: int = 4) -> Self:
        """Room for `max_batch` rows (a video takes two, for guidance) and `stretch` times the frames and the area."""
        factor, tokens = recipe.vae.spatial_factor, recipe.text.max_tokens
        frame, side = recipe.network.temporal_patch_size, recipe.network.patch_size
        frames, height, width = recipe.video.num_frames, recipe.video.height // factor, recipe.video.width // factor
        largest = {"frames": frames * stretch, "height": height * stretch, "width": width * stretch}
        if recipe.network.learned_grid is not None:  # the table of positions ends there
            table = zip(largest, recipe.network.learned_grid, (frame, side, side), strict=True)
            largest = {axis: min(largest[axis], places * patch) for axis, places, patch in table}
        return cls(
            min=Shape(batch=1, frames=frame, height=side, width=side, text_tokens=1),
            opt=Shape(
                batch=min(2, max_batch), frames=frames, height=height, width=width, text_tokens=max(1, tokens // 4)
            ),
            max=Shape(batch=max_batch, text_tokens=tokens, **largest),
            max_area=height * width * stretch,
            frame_multiple=frame,
            side_multiple=side,
            latent_channels=network.latent_channels,
            text_size=network.text_projection.hidden.in_features,
            pooled_size=network.pooled_projection.in_features,
            spatial_factor=factor,
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

    def input_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shape of every input of a call, by its name in the graph, in its order."""
        batch, tokens = shape.batch, shape.text_tokens
        return {
            "latents": (batch, shape.frames, self.latent_channels, shape.height, shape.width),
            "timestep": (batch,),
            "text": (batch, tokens, self.text_size),
            "text_mask": (batch, tokens),
            "pooled": (batch, self.pooled_size),
            "micro": (batch, sum(MICRO_GROUPS)),
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
