"""Guidance inside the graph: one call takes the rows of all passes and gives guided velocities.

It owns how rows of a call are combined, as inputs of a graph; the arithmetic is the sampler's own, traced as it is. It
knows nothing of engines.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from export.engines.protocol import Engine
from export.profiles import ShapeProfile
from model.conditioning import Conditions
from model.config import FlowConfig
from model.diffusion import flow_velocity
from model.network.stiv import STIV
from model.sampler import (
    PASSES,
    Guidance,
    GuidanceKind,
    GuidingVelocity,
    ImageCondition,
    Velocity,
    guide,
    renormalize,
)

PLACES: dict[GuidanceKind, tuple[int, int, int]] = {"joint": (0, 1, 1), "separate": (0, 1, 2), "none": (0, 0, 0)}
"""Which of its passes a video's conditional row takes as itself, as the image alone, and as neither."""

GUIDED_PREFIX = "network."
"""Of the names that weights have within a guided network."""


@dataclass(slots=True, frozen=True)
class Combination:
    """Which rows of a call guide which, for all R of them; those that are no video's conditional row are left over.

    Videos of unlike guidance share a call: `joint` names its null row twice, `none` its own row three times.
    """

    passes: Tensor
    """int64 [R, 3]: the row itself, the one that sees the image alone, the one that sees neither."""
    scales: Tensor
    """[R, 2]: of the text and of the image."""
    frame_mask: Tensor
    """bool [R, T], True where a frame is given; renormalisation leaves it out."""
    renormalize: Tensor
    """bool [R]."""

    @classmethod
    def of(cls, guidance: Guidance, image: ImageCondition) -> "Combination":
        """Of B videos whose rows stand pass by pass, as `sampler.pass_rows` gives them."""
        members, video_of = guidance.members, torch.cat(list(guidance.members.values()))
        begins = dict(zip(members, accumulate(map(len, members.values()), initial=0), strict=False))
        passes = torch.arange(len(image.frame_mask))[:, None].repeat(1, 3)
        scales = torch.ones(len(image.frame_mask), 2)
        for kind in set(guidance.kinds):
            videos = guidance.rows_of(lambda each, wanted=kind: each == wanted)
            for column, place in enumerate(PLACES[kind]):
                its = members[PASSES[kind][place]]
                passes[videos, column] = begins[PASSES[kind][place]] + torch.searchsorted(its, videos)
            for column, scale in enumerate(guidance.scales(kind, videos)):
                scales[videos, column] = scale.float()
        return cls(
            passes=passes[video_of],
            scales=scales[video_of],
            frame_mask=image.frame_mask[video_of],
            renormalize=torch.full((len(video_of),), guidance.renormalize),
        )

    @classmethod
    def plain(cls, rows: int, frames: int) -> "Combination":
        """No guidance: every row's own velocity."""
        own = torch.arange(rows)
        return cls(
            passes=own[:, None].expand(-1, 3).contiguous(),
            scales=torch.ones(rows, 2),
            frame_mask=torch.zeros(rows, frames, dtype=torch.bool),
            renormalize=torch.zeros(rows, dtype=torch.bool),
        )


def combine(velocity: Tensor, combination: Combination) -> Tensor:
    """Guided velocity [R, T, C, H, W] of the rows' own."""
    predicted = [velocity[combination.passes[:, place]] for place in range(3)]
    guided = guide(predicted, [combination.scales[:, 0], combination.scales[:, 1]])
    kept = renormalize(guided, predicted[0], combination.frame_mask)
    return torch.where(combination.renormalize[:, None, None, None, None], kept, guided)


class Guiding(Protocol):
    """An engine that combines rows itself."""

    def denoise(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions, combination: Combination | None = None
    ) -> Tensor: ...


def velocity_of(engine: Engine, flow: FlowConfig) -> Velocity:
    """What the sampler follows with `engine`, which may have guidance inside (its profile says so)."""
    profile = getattr(engine, "profile", None)
    if not (isinstance(profile, ShapeProfile) and profile.guided):
        return flow_velocity(flow, engine.denoise)
    guiding = cast(Guiding, engine)

    def call(
        latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: Guidance, image: ImageCondition
    ) -> Tensor:
        return guiding.denoise(latents, timestep, conditions, Combination.of(guidance, image))

    return GuidingVelocity(call)


class GuidedNetwork(nn.Module):
    """The network and its guidance as one graph."""

    def __init__(self, network: STIV) -> None:
        super().__init__()
        self.network = network

    def forward(  # noqa: PLR0913 a graph's inputs, in the order of its signature
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor,
        pooled: Tensor,
        micro: Tensor,
        image: Tensor | None = None,
        image_given: Tensor | None = None,
        *,
        passes: Tensor,
        scales: Tensor,
        frame_mask: Tensor,
        renormalize: Tensor,
    ) -> Tensor:
        velocity = self.network(latents, timestep, text, text_mask, pooled, micro, image=image, image_given=image_given)
        return combine(velocity, Combination(passes, scales, frame_mask, renormalize))
