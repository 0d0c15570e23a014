"""Where a stream of frames is cut, what is cut off at its sides, and which segments of a large set look alike."""

from collections.abc import Iterator

import numpy as np
import pytest

from infra.curate.cut import find_borders, segments
from infra.curate.duplicates import Fingerprint, find_duplicates
from infra.curate.footage import Frame, Moment
from infra.curate.recipe import CutConfig, DuplicatesConfig
from model.data.scenes import Picture

FPS = 24.0


def pictures(seed: int, count: int, *, drift: float = 0.5) -> Iterator[Frame]:
    """A textured picture that slowly moves sideways."""
    texture = np.random.default_rng(seed).integers(40, 255, (12, 24, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    for number in range(count):
        yield np.roll(texture, round(number * drift), axis=1)


def cut_into(frames: list[Frame], config: CutConfig) -> list[int]:
    """The first frame of every segment."""
    picture = Picture(96, 192, 0)
    return [each.start for each in segments((Moment(frame, picture) for frame in frames), FPS, config)]


def faded(frames: list[Frame], length: int) -> list[Frame]:
    """Out to black over the last frames."""
    kept = len(frames) - length
    down = [(frame * (1 - (n + 1) / length)).astype(np.uint8) for n, frame in enumerate(frames[kept:])]
    return [*frames[:kept], *down]


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_a_hard_cut_is_found_on_its_frame_by_either_detector(detector: str) -> None:
    frames = [*pictures(1, 50), *pictures(2, 70)]
    config = CutConfig.model_validate({"detector": detector})
    assert cut_into(frames, config) == [0, 50]


def test_a_whip_pan_is_cut_by_content_and_not_by_adaptive() -> None:
    still, pan = [next(pictures(3, 1))] * 40, [*pictures(3, 20, drift=37.0)]
    frames = [*still, *pan, *[pan[-1]] * 40]
    assert len(cut_into(frames, CutConfig(detector="content"))) > 1
    assert cut_into(frames, CutConfig(detector="adaptive")) == [0]


def test_a_fade_through_black_is_a_cut_unless_none_are_looked_for() -> None:
    out, in_ = faded([*pictures(4, 80)], 30), faded([*pictures(4, 80)], 30)[::-1]
    looking = CutConfig(threshold=200.0)  # no hard cut is that hard: what is found is the fade
    found = cut_into([*out, *in_], looking)
    assert len(found) == 2 and 70 <= found[1] <= 90
    assert cut_into([*out, *in_], looking.model_copy(update={"fade_threshold": 0.0})) == [0]


def test_a_static_plain_border_is_cut_off_and_a_plain_sky_on_one_side_is_not() -> None:
    def framed(rows: int, below: int) -> list[Frame]:
        whole = [frame.copy() for frame in pictures(5, 12, drift=3.0)]
        for frame in whole:
            frame[:rows] = (180, 120, 60)
            if below:
                frame[-below:] = (60, 120, 180)
        return whole

    top, bottom, left, right = find_borders(framed(12, 12))
    assert 12 / 96 <= top <= 14 / 96 and 12 / 96 <= bottom <= 14 / 96 and not left and not right
    assert find_borders(framed(30, 0)) == (0.0, 0.0, 0.0, 0.0)


def test_near_duplicates_are_found_in_a_set_that_needs_an_index() -> None:
    generator = np.random.default_rng(6)
    vectors = generator.standard_normal((6000, 48)).astype(np.float32)
    vectors[5000:5100] = vectors[:100] + 0.02 * generator.standard_normal((100, 48))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    bits = generator.integers(0, 2, (6000, 192), np.uint8)
    prints = {f"{place:05d}": Fingerprint(bits[place], vectors[place]) for place in range(6000)}
    dropped = find_duplicates(prints, sorted(prints), DuplicatesConfig())
    assert set(dropped.items()) <= {(f"{5000 + place:05d}", f"{place:05d}") for place in range(100)}
    assert len(dropped) >= 98  # of an index by cells: each vector is looked for in two of 77
