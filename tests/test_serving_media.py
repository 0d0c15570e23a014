import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from infra.serving import media
from infra.serving.safety.decoding import BadUpload, Wanted, decode
from model.data import moving_shapes

CLIP = next(iter(moving_shapes.generate(1, num_frames=8, size=32, seed=3))).frames


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def conditioned(data: bytes, *, width: int = 32, height: int = 32, max_pixels: int = 10_000) -> np.ndarray:
    wanted = Wanted("image", width, height, max_pixels=max_pixels, max_side=20_000, max_seconds=5)
    return media.read_image(decode(data, wanted))


def test_an_mp4_decodes_to_its_frames_and_starts_with_its_index(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    media.write_mp4(path, CLIP, 8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 8
    assert decoded.shape == CLIP.shape
    assert np.abs(decoded.astype(int) - CLIP).mean() < 4
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_equal_frames_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        media.write_mp4(tmp_path / name, CLIP, 8)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_odd_sides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="31x32 cannot be yuv420p video: both sides must be even"):
        media.write_mp4(tmp_path / "clip.mp4", CLIP[:, :, :31], 8)


def test_the_thumbnail_is_the_first_frame_and_the_sheet_shows_all() -> None:
    thumbnail = Image.open(io.BytesIO(media.thumbnail(CLIP)))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (32, 32))
    sheet = Image.open(io.BytesIO(media.spritesheet(CLIP)))
    assert (sheet.format, sheet.size) == ("JPEG", (96, 96))
    fourth = np.asarray(sheet.crop((0, 32, 32, 64))).astype(int)
    assert np.abs(fourth - CLIP[3]).mean() < 10


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_an_upload_of_the_right_size_is_kept_as_it_is(format: str) -> None:
    options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[format]
    frame = conditioned(encoded(Image.fromarray(CLIP[0]), format, **options))
    assert frame.shape == (1, 32, 32, 3)
    assert np.abs(frame[0].astype(int) - CLIP[0]).mean() <= (5 if format == "JPEG" else 0)


def test_an_upload_is_scaled_to_cover_and_cropped_at_the_centre() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    assert conditioned(encoded(Image.fromarray(wide), "PNG"), width=16, height=16).mean() > 250


def test_a_photo_is_turned_upright_and_transparency_is_dropped() -> None:
    image = Image.fromarray(np.stack([np.full((16, 16), 255), *[np.zeros((16, 16))] * 2], axis=2).astype(np.uint8))
    tall = Image.new("RGB", (32, 16))
    tall.paste(image, (0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to the right
    frame = conditioned(encoded(tall, "JPEG", exif=exif, quality=95), width=16, height=32)[0]
    assert frame[4, 8, 0] > 200 and frame[28, 8, 0] < 50
    assert conditioned(encoded(Image.new("RGBA", (32, 32), (255, 0, 0, 128)), "PNG")).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes are not a readable image; upload one of PNG, JPEG, WEBP"),
        (b"\x89PNG\r\n\x1a\nnonsense", "not a readable image"),
        (encoded(Image.fromarray(CLIP[0]), "PNG")[:-40], "complete and undamaged"),
        (encoded(Image.fromarray(CLIP[0]), "JPEG")[:-200], "complete and undamaged"),
        (encoded(Image.fromarray(CLIP[0]), "WEBP")[:-60], "complete and undamaged"),
        (encoded(Image.fromarray(CLIP[0]), "GIF"), "upload one of PNG, JPEG, WEBP"),
        (encoded(Image.new("RGB", (101, 100)), "PNG"), "101x100 = 10100 pixels, at most 10000"),
        (encoded(Image.new("1", (10_000, 10_000)), "PNG"), "pixels"),
    ],
)
def test_what_cannot_be_a_first_frame_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadUpload, match=words):
        conditioned(data)


def test_every_flipped_byte_is_either_read_or_refused() -> None:
    for format in ("PNG", "JPEG", "WEBP"):
        good = encoded(Image.fromarray(CLIP[0]), format)
        for position in range(0, len(good), 7):
            data = bytearray(good)
            data[position] ^= 0xFF
            try:
                assert conditioned(bytes(data)).shape == (1, 32, 32, 3)
            except BadUpload:
                continue


def numbered(path: Path, times: list[Fraction], form: str, *, rate: int = 10) -> bytes:
    """A video whose frame i is as bright as 8 i, shown from `times[i]` on by its format's usual clock."""
    clock = Fraction(1, 1000 if form == "matroska" else 90_000)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1"})
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = clock
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 8 * index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time / clock), clock
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    return path.read_bytes()


def taken(data: bytes, fps: int) -> list[int]:
    """Which frames of `numbered` an upload becomes at `fps`."""
    wanted = Wanted("frames", 16, 16, max_pixels=10_000, max_side=100, max_seconds=5, fps=fps, max_frames=100)
    clip = media.read_frames(decode(data, wanted)[4:])
    return [round(float(frame.mean()) / 8) for frame in clip]


@pytest.mark.parametrize("form", ["mp4", "matroska"])  # clocks of 1/90000 and of 1/1000 s
@pytest.mark.parametrize(
    ("source", "fps", "frames"),
    [
        (24, 8, [0, 3, 6, 9, 12, 15, 18, 21]),
        (30, 8, [0, 3, 7, 11, 15, 18, 22, 26]),
        (25, 10, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]),
        (30, 30, list(range(30))),
        (8, 24, [frame for frame in range(8) for _ in range(3)]),
    ],
)
def test_an_uploaded_second_becomes_the_frames_shown_at_its_times(
    tmp_path: Path, form: str, source: int, fps: int, frames: list[int]
) -> None:
    times = [Fraction(index, source) for index in range(source)]
    assert taken(numbered(tmp_path / "video", times, form, rate=source), fps) == frames


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_a_video_of_uneven_frames_is_sampled_by_its_clock(tmp_path: Path, form: str) -> None:
    times = [Fraction(cents, 100) for cents in (0, 10, 20, 50, 55, 90, 100)]
    data = numbered(tmp_path / "video", [5 + time for time in times], form)
    assert taken(data, 10)[:11] == [0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6]
    assert taken(data, 2)[:3] == [0, 3, 6]
