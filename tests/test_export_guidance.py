"""Guidance inside the graph is the sampler's guidance, for videos of unlike kinds in one call."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from export.guidance import Combination, combine
from model.conditioning import Conditions, first_frames
from model.sampler import Guidance, GuidanceKind, GuidingVelocity, ImageCondition, guided_velocity

B, T, C, H, W = 3, 4, 2, 2, 2


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def conditions(seed: int) -> Conditions:
    mask = torch.ones(B, 3, dtype=torch.bool)
    return Conditions(normal(B, 3, 5, seed=seed), mask, normal(B, 5, seed=seed), torch.ones(B, 6))


def network(latents: Tensor, t: Tensor, given: Conditions) -> Tensor:
    """Something that tells every row and every condition apart."""
    own = given.text.sum((1, 2)) + given.pooled.sum(1) + t
    return torch.sin(latents * own[:, None, None, None, None]) + latents


def guiding(calls: list[int]) -> GuidingVelocity:
    """As an engine with guidance inside answers."""

    def call(latents: Tensor, t: Tensor, given: Conditions, guidance: Guidance, image: ImageCondition) -> Tensor:
        calls.append(len(latents))
        return combine(network(latents, t, given), Combination.of(guidance, image))

    return GuidingVelocity(call)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [("joint", 6), ("separate", 9), ("none", 3), (("separate", "none", "joint"), 6), (("none", "joint", "joint"), 5)],
)
def test_every_kind_of_guidance_is_the_samplers_to_the_bit(
    kind: GuidanceKind | tuple[GuidanceKind, ...], rows: int, renormalize: bool
) -> None:
    latents, t = normal(B, T, C, H, W), torch.tensor([0.0, 0.4, 0.9])
    scale, image_scale = torch.tensor([1.0, 3.0, 7.5]), torch.tensor([1.5, 1.0, 4.0])
    guidance = Guidance(conditions(1), conditions(2), scale, renormalize, kind, image_scale)
    mask = first_frames(B, T).clone()
    mask[1] = False
    image = ImageCondition(normal(B, T, C, H, W, seed=3), mask, normal(B, T, C, H, W, seed=4))
    calls: list[int] = []
    expected = guided_velocity(network, latents, t, guidance, image)
    found = guided_velocity(guiding(calls), latents, t, guidance, image)
    assert torch.equal(found, expected) and calls == [rows]
    assert not torch.allclose(
        found, guided_velocity(network, latents, t, replace(guidance, scale=scale + 1), image)
    ) or (kind == "none")


def test_videos_of_unlike_guidance_share_a_call_and_rows_left_over_stay_finite() -> None:
    """Rows 0 and 1: joint and no guidance; row 2 is the null row of the first."""
    velocity, mask = normal(3, T, C, H, W), torch.zeros(3, T, dtype=torch.bool)
    passes = torch.tensor([[0, 2, 2], [1, 1, 1], [2, 2, 2]])
    scales, keep = torch.tensor([[3.0, 1.0], [9.0, 9.0], [1.0, 1.0]]), torch.tensor([False, True, True])
    guided = combine(velocity, Combination(passes, scales, mask, keep))
    assert torch.allclose(guided[0], velocity[2] + 3 * (velocity[0] - velocity[2]))
    assert torch.allclose(guided[1], velocity[1]) and torch.allclose(guided[2], velocity[2])
    zero = combine(torch.zeros_like(velocity), Combination(passes, scales, mask, keep))
    assert torch.equal(zero, torch.zeros_like(zero))


def test_without_guidance_every_row_is_its_own() -> None:
    velocity = normal(4, T, C, H, W)
    assert torch.equal(combine(velocity, Combination.plain(4, T)), velocity)
