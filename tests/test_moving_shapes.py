"""Moving shapes and their checker: what is drawn is what is seen."""

import math

import numpy as np
import pytest

from model.data.moving_shapes import ALL_SPECS, TRAVEL, ShapeSpec, draw, generate
from model.measures.checker import Observation, accuracy, first_frame_psnr, observe, speed_error


@pytest.mark.parametrize("size", [24, 32, 48])
def test_the_checker_reads_every_drawn_clip_right(size: int) -> None:
    clips = list(generate(2 * len(ALL_SPECS), num_frames=8, size=size, seed=size))
    seen = [observe(clip.frames) for clip in clips]
    assert [s for s, c in zip(seen, clips, strict=True) if not s.matches(c.spec)] == []


def test_every_combination_comes_equally_often_and_stays_in_the_frame() -> None:
    clips = list(generate(len(ALL_SPECS), num_frames=8, size=32, seed=1))
    assert {clip.spec for clip in clips} == set(ALL_SPECS)
    for clip in clips:
        border = np.concatenate([clip.frames[:, 0], clip.frames[:, -1], clip.frames[:, :, 0], clip.frames[:, :, -1]], 1)
        assert border.max() < 60, clip.spec


def test_the_same_seed_draws_the_same_clips() -> None:
    one, two = (list(generate(5, num_frames=4, size=32, seed=3)) for _ in range(2))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(one, two, strict=True))


def test_noise_blank_frames_and_stillness_count_as_wrong() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, size=(8, 32, 32, 3), dtype=np.uint8)
    assert observe(noise).shape is None
    assert observe(np.full((8, 32, 32, 3), 20, dtype=np.uint8)) == Observation(None, None, None, None)
    spec = ShapeSpec("red", "circle", "up")
    still = draw(spec, num_frames=1, size=32, rng=rng).frames.repeat(8, axis=0)
    assert observe(still) == Observation("red", "circle", None, None)
    assert accuracy([observe(still)], [spec]).joint == 0.0


@pytest.mark.parametrize("num_frames", [4, 8, 20])
def test_the_speed_that_is_read_is_the_speed_that_was_drawn(num_frames: int) -> None:
    clips = list(generate(len(ALL_SPECS), num_frames=num_frames, size=32, seed=2))
    seen = [observe(clip.frames) for clip in clips]
    assert [each.travel for each in seen] == pytest.approx([TRAVEL] * len(clips), abs=0.02)
    assert speed_error(seen, [TRAVEL] * len(clips)) < 0.02
    slow = [observe(clip.frames[: num_frames // 2 + 1]) for clip in clips]
    assert speed_error(slow, [TRAVEL] * len(clips)) == pytest.approx(1 - (num_frames // 2) / (num_frames - 1), abs=0.05)


def test_a_still_clip_has_all_of_the_speed_wrong_and_an_unknown_speed_counts_for_nothing() -> None:
    rng = np.random.default_rng(0)
    spec = ShapeSpec("blue", "square", "left")
    moving = observe(draw(spec, num_frames=8, size=32, rng=rng).frames)
    still = observe(draw(spec, num_frames=1, size=32, rng=rng).frames.repeat(8, axis=0))
    assert speed_error([still], [TRAVEL]) == 1.0
    assert speed_error([moving, still], [moving.travel, TRAVEL]) == 0.5
    assert speed_error([moving, still], [moving.travel, None]) == 0.0
    assert math.isnan(speed_error([moving], [None]))


def test_the_speed_does_not_depend_on_how_many_frames_show_the_shape() -> None:
    clip = draw(ShapeSpec("red", "square", "right"), num_frames=8, size=32, rng=np.random.default_rng(4)).frames
    hidden = clip.copy()
    hidden[6:] = 20
    assert observe(hidden).travel == pytest.approx(observe(clip).travel, abs=0.02)


def test_first_frame_psnr_falls_with_the_error() -> None:
    clip = draw(ALL_SPECS[0], num_frames=2, size=32, rng=np.random.default_rng(0)).frames
    assert first_frame_psnr(clip, clip[0]) == 99.0
    assert first_frame_psnr(clip, np.clip(clip[0].astype(int) + 8, 0, 255).astype(np.uint8)) == pytest.approx(
        30.1, abs=0.3
    )
