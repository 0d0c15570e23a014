"""Measures of clips: Fréchet distance, Inception Score, motion, nearness and the features that need no weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.data.moving_shapes import ShapeSpec, draw, generate
from model.measures.features import PixelMotionFeatures
from model.measures.frechet import frechet_distance, inception_score
from model.measures.motion import Frames, dynamic_degree, mean_flow, pair_flows
from model.measures.similarity import psnr, ssim


def _normal(rows: int, size: int, seed: int, *, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64) * scale + shift


def _by_matrix_root(a: Tensor, b: Tensor) -> float:
    """The textbook formula, with the root of a symmetric matrix by its eigenvalues."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T

    left, right = torch.cov(a.T), torch.cov(b.T)
    crossed = root(root(left) @ right @ root(left))
    return float((a.mean(0) - b.mean(0)).square().sum() + torch.trace(left) + torch.trace(right) - 2 * crossed.trace())


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    one = _normal(4000, 3, 0)
    one = (one - one.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(one.T))).T  # exactly N(0, 1)
    other = 3.0 * one + torch.tensor([1.0, 2.0, 2.0])
    assert frechet_distance(one, other) == pytest.approx(9.0 + 3 * (3.0 - 1.0) ** 2, rel=1e-9)


@pytest.mark.parametrize(("rows", "size"), [(200, 12), (13, 12), (64, 4)])
def test_frechet_distance_agrees_with_the_matrix_root(rows: int, size: int) -> None:
    one, other = _normal(rows, size, 1), _normal(rows + 7, size, 2, scale=1.5, shift=0.3)
    assert frechet_distance(one, other) == pytest.approx(_by_matrix_root(one, other), rel=1e-6)


def test_frechet_distance_is_zero_to_itself_with_fewer_rows_than_values() -> None:
    few = _normal(8, 500, 3)
    assert frechet_distance(few, few.flip(0)) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(few, few + 0.5) == pytest.approx(500 * 0.25, rel=1e-9)


def test_features_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(_normal(1, 4, 0), _normal(9, 4, 0))
    with pytest.raises(ValueError, match="4 and 5 values"):
        frechet_distance(_normal(9, 4, 0), _normal(9, 5, 0))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(torch.full((4, 2), torch.nan), _normal(9, 2, 0))


def test_inception_score_counts_the_classes_that_are_sure_and_even() -> None:
    sure = torch.eye(5).repeat(20, 1)
    assert inception_score(sure, splits=2) == pytest.approx((5.0, 0.0))
    assert inception_score(torch.full((20, 5), 0.2), splits=4) == pytest.approx((1.0, 0.0))
    with pytest.raises(ValueError, match="softmax"):
        inception_score(torch.full((20, 5), 2.0))


def test_flow_of_moving_shapes_is_the_distance_they_are_drawn_to_move() -> None:
    clips = [clip.frames for clip in generate(12, num_frames=8, size=32, seed=3)]
    assert mean_flow(clips) == pytest.approx(0.5 / 7, rel=0.15)
    assert dynamic_degree(clips) == 1.0


def test_still_clips_have_no_dynamic_degree_and_half_of_a_mixture_has() -> None:
    moving = [clip.frames for clip in generate(4, num_frames=8, size=32, seed=3)]
    still = [clip[:1].repeat(8, axis=0) for clip in moving]
    assert dynamic_degree(still) == 0.0
    assert mean_flow(still) < 1e-3
    assert dynamic_degree(moving + still) == 0.5


def test_flow_does_not_depend_on_the_size_of_the_frames() -> None:
    flows: list[float] = []
    for size in (32, 64, 192):
        rng = np.random.default_rng(1)
        flows.append(mean_flow([draw(ShapeSpec("red", "circle", "up"), num_frames=8, size=size, rng=rng).frames]))
    assert flows == pytest.approx([flows[0]] * 3, rel=0.15)


def test_flow_is_measured_at_eight_frames_a_second() -> None:
    clip = next(generate(1, num_frames=15, size=32, seed=0)).frames
    assert len(pair_flows(clip, fps=16)) == 7
    assert mean_flow([clip], fps=16) == pytest.approx(2 * mean_flow([clip]), rel=0.3)
    with pytest.raises(ValueError, match="no pair"):
        pair_flows(clip[:1])


def test_pixel_motion_features_tell_still_from_moving_and_red_from_blue() -> None:
    extract = PixelMotionFeatures()
    rng = np.random.default_rng(0)
    drawn = {
        color: [draw(ShapeSpec(color, "circle", "up"), num_frames=8, size=32, rng=rng).frames for _ in range(40)]
        for color in ("red", "blue")
    }
    still = [clip[:1].repeat(8, axis=0) for clip in drawn["red"][:20]]
    red, more_red = extract(drawn["red"][:20]), extract(drawn["red"][20:])
    assert red.shape == (20, (3 + 1) * 8 * 8 * 3)
    same = frechet_distance(red, more_red)
    assert frechet_distance(red, extract(drawn["blue"][:20])) > 2 * same
    assert frechet_distance(red, extract(still)) > 1.2 * same


def _pictures() -> tuple[Frames, Frames]:
    """A picture of gradients and the same with a pattern added, 24 x 40."""
    y, x = np.mgrid[0:24, 0:40]
    clean = np.stack([(x * 5) % 256, (y * 9) % 256, (x * y) % 256], axis=-1).astype(np.uint8)
    pattern = ((x * 7 + y * 13) % 31 - 15)[..., None]
    return clean[None], np.clip(clean.astype(int) + pattern, 0, 255).astype(np.uint8)[None]


def test_ssim_and_psnr_are_those_of_scikit_image() -> None:
    """structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255), 0.26.0."""
    clean, changed = _pictures()
    assert ssim(clean, changed) == pytest.approx(0.8289164932517207, rel=1e-6)
    assert ssim(clean, 255 - clean) == pytest.approx(-0.5379917302182725, rel=1e-6)
    assert psnr(clean, changed) == pytest.approx(29.288594658077464, rel=1e-9)


def test_equal_clips_are_as_near_as_can_be_and_clips_are_measured_frame_by_frame() -> None:
    clean, changed = _pictures()
    assert (psnr(clean, clean), ssim(clean, clean)) == (99.0, pytest.approx(1.0))
    both, twice = np.concatenate([clean, changed]), np.concatenate([clean, clean])
    assert psnr(both, twice) == pytest.approx((99.0 + psnr(changed, clean)) / 2)
    assert ssim(both, twice) == pytest.approx((1.0 + ssim(changed, clean)) / 2)


def test_clips_of_other_shapes_or_too_small_for_ssim_are_refused() -> None:
    clean, _ = _pictures()
    with pytest.raises(ValueError, match="cut them alike"):
        psnr(clean, clean[:, 1:])
    with pytest.raises(ValueError, match="window of 11"):
        ssim(clean[:, :8], clean[:, :8])
