"""The sampler: closed-form flows, guidances, renormalisation, clean frames, rows that stand at different times."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.conditioning import Conditions, first_frames
from model.config import SamplingConfig
from model.sampler import (
    Guidance,
    ImageCondition,
    Step,
    denoise_step,
    guide,
    guided_velocity,
    no_image,
    renormalize,
    sample_steps,
    timestep_schedule,
)

SHAPE = (2, 3, 2, 4, 4)


def conditions(rows: int, value: float) -> Conditions:
    return Conditions(
        torch.full((rows, 1, 1), value),
        torch.ones(rows, 1, dtype=torch.bool),
        torch.zeros(rows, 1),
        torch.zeros(rows, 6),
    )


def guidance(rows: int = 2, scale: float = 1.0, *, renorm: bool = False) -> Guidance:
    return Guidance(conditions(rows, 1.0), conditions(rows, 0.0), torch.full((rows,), scale), renorm)


def point_flow(target: Tensor) -> Callable[[Tensor, Tensor, Conditions], Tensor]:
    """The exact velocity of the flow from normal noise to one point: (target - x) / (1 - t)."""

    def velocity(x: Tensor, t: Tensor, _: Conditions) -> Tensor:
        rows = target.repeat(x.shape[0] // target.shape[0], 1, 1, 1, 1)
        return (rows - x) / (1 - t).view(-1, 1, 1, 1, 1)

    return velocity


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_straight_flow_is_followed_exactly(solver: str) -> None:
    target, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    config = SamplingConfig(solver=solver, stochastic=False, num_steps=5, guidance_scale=1.0)  # pyright: ignore[reportArgumentType]
    *_, drawn = sample_steps(point_flow(target), noise, guidance(), no_image(noise), config)
    assert torch.allclose(drawn, target, atol=1e-4)


def normal_flow(deviation: float) -> Callable[[Tensor, Tensor, Conditions], Tensor]:
    """The exact velocity of the flow from N(0, 1) to N(0, deviation^2)."""

    def velocity(x: Tensor, t: Tensor, _: Conditions) -> Tensor:
        t = t.view(-1, 1, 1, 1, 1)
        variance = (t * deviation) ** 2 + (1 - t) ** 2
        return (t * deviation**2 - (1 - t)) / variance * x

    return velocity


@pytest.mark.parametrize(("solver", "stochastic"), [("euler", False), ("heun", False), ("euler", True), ("heun", True)])
def test_every_solver_reaches_the_spread_of_the_data(solver: str, stochastic: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 4, 8, 8, 8, generator=rng)
    config = SamplingConfig(solver=solver, stochastic=stochastic, num_steps=100, guidance_scale=1.0)  # pyright: ignore[reportArgumentType]
    *_, drawn = sample_steps(normal_flow(0.5), noise, guidance(4), no_image(noise), config, generator=rng)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.06)
    assert drawn.mean().item() == pytest.approx(0.0, abs=0.03)


def test_heun_is_closer_than_euler_at_equal_steps() -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    errors: dict[str, float] = {}
    for solver in ("euler", "heun"):
        config = SamplingConfig(solver=solver, stochastic=False, num_steps=10, guidance_scale=1.0)  # pyright: ignore[reportArgumentType]
        *_, drawn = sample_steps(normal_flow(0.5), noise, guidance(), no_image(noise), config)
        errors[solver] = (drawn - 0.5 * noise).abs().max().item()
    assert errors["heun"] < 0.5 * errors["euler"]


def test_guidance_one_is_the_conditional_prediction_and_zero_the_null_one() -> None:
    conditional, null = torch.randn(SHAPE), torch.randn(SHAPE)
    guided = guide([conditional, null], [torch.tensor([1.0, 0.0])])
    assert torch.allclose(guided[0], conditional[0], atol=1e-6)
    assert torch.equal(guided[1], null[1])


def test_renormalising_gives_each_row_its_conditional_norm_outside_clean_frames() -> None:
    conditional, guided = torch.randn(SHAPE), 7 * torch.randn(SHAPE)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    scaled = renormalize(guided, conditional, mask)
    assert scaled[0, 1:].norm().item() == pytest.approx(conditional[0, 1:].norm().item(), rel=1e-5)
    assert scaled[1].norm().item() == pytest.approx(conditional[1].norm().item(), rel=1e-5)


def test_the_conditional_pass_sees_the_clean_frame_and_the_null_pass_a_noised_one() -> None:
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    clean, noise = torch.full(SHAPE, 5.0), torch.full(SHAPE, -1.0)
    image = ImageCondition(clean, first_frames(2, 3), noise)
    guided_velocity(velocity, torch.zeros(SHAPE), torch.full((2,), 0.25), guidance(), image)
    conditional, null = seen[0].chunk(2)
    assert (conditional[:, 0] == 5.0).all() and (conditional[:, 1:] == 0).all()
    assert torch.allclose(null[:, 0], torch.full_like(null[:, 0], 0.25 * 5.0 - 0.75))


def told(x: Tensor, t: Tensor, given: Conditions) -> Tensor:
    """A velocity that says what a pass was given: text T, image I by frame replacement, J by cross-attention."""
    text = given.text.mean(dim=(1, 2))
    image = x[:, :1].mean(dim=(1, 2, 3, 4))
    attended = torch.zeros_like(t) if given.image is None else given.image.mean(dim=(1, 2, 3))
    if given.image_given is not None:
        attended = attended * given.image_given
    said = 2 * text + 3 * image + 5 * attended + 7 * text * (image + attended)
    return said[:, None, None, None, None].expand(x.shape).clone()


def told_velocity(given: Guidance, *, frames: float = 1.0) -> Tensor:
    """Frame 0 is clean, of value `frames`; a noised one is 0."""
    image = ImageCondition(torch.full(SHAPE, frames), first_frames(2, 3), torch.full(SHAPE, -frames))
    return guided_velocity(told, torch.zeros(SHAPE), torch.full((2,), 0.5), given, image)[:, 1, 0, 0, 0]


def test_separate_guidance_scales_text_and_image_apart() -> None:
    scale, image_scale = torch.tensor([7.5, 2.0]), torch.tensor([1.5, 4.0])
    found = told_velocity(replace(guidance(), kind="separate", scale=scale, image_scale=image_scale))
    nothing, image, everything = 0.0, 3.0, 2.0 + 3.0 + 7.0
    assert torch.equal(found, nothing + image_scale * (image - nothing) + scale * (everything - image))


def test_separate_guidance_by_equal_scales_is_joint_guidance() -> None:
    scale = torch.tensor([1.5, 6.0])
    joint = replace(guidance(), scale=scale)
    assert torch.allclose(told_velocity(replace(joint, kind="separate", image_scale=scale)), told_velocity(joint))


def test_no_guidance_is_one_conditional_pass() -> None:
    rows: list[int] = []

    def velocity(x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        rows.append(x.shape[0])
        return told(x, t, given)

    x, t, image = torch.randn(SHAPE), torch.full((2,), 0.5), no_image(torch.zeros(SHAPE))
    plain = Guidance(conditions(2, 1.0), conditions(2, 0.0), torch.full((2,), 9.0), kind="none")
    assert torch.equal(guided_velocity(velocity, x, t, plain, image), told(x, t, conditions(2, 1.0)))
    assert rows == [2]


def test_separate_guidance_without_a_scale_for_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image_scale is None"):
        told_velocity(replace(guidance(), kind="separate"))


def test_null_frames_may_be_zero_latents() -> None:
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    image = ImageCondition(torch.full(SHAPE, 5.0), first_frames(2, 3), torch.full(SHAPE, -1.0))
    latents = torch.full(SHAPE, 2.0)
    given = replace(guidance(), null_frames="zeros")
    moved = denoise_step(velocity, latents, Step(torch.zeros(2), torch.full((2,), 0.5)), given, image)
    conditional, null = seen[0].chunk(2)
    assert (conditional[:, 0] == 5.0).all() and (null[:, 0] == 0.0).all() and (null[:, 1:] == 2.0).all()
    assert (moved[:, 0] == 0.5 * 5.0 - 0.5).all()  # outside the null pass the frame stays on its path


@pytest.mark.parametrize(
    ("kind", "given"), [("joint", [1, 0]), ("separate", [1, 1, 0]), ("none", [1])], ids=["joint", "separate", "none"]
)
def test_an_image_that_is_attended_to_is_given_to_the_passes_that_see_images(kind: str, given: list[int]) -> None:
    asked: list[Conditions] = []

    def velocity(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        asked.append(conditions)
        return torch.zeros_like(x)

    picture = torch.ones(2, *SHAPE[2:])
    with_image = conditions(2, 1.0).with_image(picture, torch.tensor([True, False]))
    row = Guidance(with_image, conditions(2, 0.0), torch.ones(2), kind=kind, image_scale=torch.ones(2))  # pyright: ignore[reportArgumentType]
    guided_velocity(velocity, torch.zeros(SHAPE), torch.zeros(2), row, no_image(torch.zeros(SHAPE)))
    assert asked[0].image is not None and asked[0].image_given is not None
    assert asked[0].image_given.tolist() == [flag for there in given for flag in (bool(there), False)]
    assert (asked[0].image[~asked[0].image_given] == 0).all()


def test_sampling_follows_its_configuration() -> None:
    noise = torch.randn(SHAPE)

    def velocity(x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        return told(x, t, given) + noise.repeat(x.shape[0] // 2, 1, 1, 1, 1)

    def drawn(**choices: Any) -> Tensor:
        config = SamplingConfig(solver="euler", stochastic=False, num_steps=2, **choices)
        image = ImageCondition(torch.ones(SHAPE), first_frames(2, 3), noise)
        return list(sample_steps(velocity, noise, guidance(scale=3.0), image, config))[-1]

    plain: dict[str, Any] = {"renormalize": False}
    choices: list[dict[str, Any]] = [
        {"renormalize": True},
        {"guidance": "none"},
        {"guidance": "separate"},
        {"guidance": "separate", "image_guidance_scale": 2.0},
        {"null_frames": "zeros"},
    ]
    videos = [drawn(**plain), *(drawn(**{**plain, **choice}) for choice in choices)]
    for place, video in enumerate(videos):
        assert not any(torch.allclose(video, other) for other in videos[:place]), ([plain, *choices])[place]


def test_clean_frames_come_back_as_given() -> None:
    clean = torch.randn(SHAPE)
    noise = torch.randn(SHAPE)
    image = ImageCondition(clean, first_frames(2, 3), noise)
    config = SamplingConfig(solver="heun", stochastic=True, num_steps=4, guidance_scale=2.0)
    *_, drawn = sample_steps(
        normal_flow(0.5), noise, guidance(scale=2.0), image, config, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(drawn[:, 0], clean[:, 0])
    assert not torch.allclose(drawn[:, 1], clean[:, 1])


def test_unlike_rows_step_together_as_they_would_alone() -> None:
    latents = torch.randn(SHAPE)
    start, end = torch.tensor([0.1, 0.7]), torch.tensor([0.2, 0.75])
    scales = torch.tensor([1.5, 6.0])
    mask = torch.tensor([[True, False, False], [False, False, False]])
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)

    def velocity(x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        return torch.sin(x) * t.view(-1, 1, 1, 1, 1) + given.text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)

    def step(rows: slice) -> Tensor:
        count = len(range(2)[rows])
        return denoise_step(
            velocity,
            latents[rows],
            Step(start[rows], end[rows], "heun"),
            Guidance(conditions(count, 1.0), conditions(count, 0.0), scales[rows]),
            ImageCondition(clean[rows], mask[rows], noise[rows]),
        )

    assert torch.allclose(step(slice(0, 2)), torch.cat([step(slice(0, 1)), step(slice(1, 2))]), atol=1e-6)


def test_the_schedule_runs_from_noise_to_data_and_shift_lingers_at_noise() -> None:
    plain, shifted = timestep_schedule(10), timestep_schedule(10, 5.0)
    assert plain[0] == shifted[0] == 0 and plain[-1] == shifted[-1] == 1
    assert (shifted.diff() > 0).all() and (shifted[1:-1] < plain[1:-1]).all()
