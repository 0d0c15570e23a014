"""Reading what strangers upload: an image becomes the first frame, a video the frames that are continued.

It owns the allowed formats and their checks; it imports nothing of ours and, run as a script, it is the process in
which `uploads` reads an upload: a decoder that hangs, swells or crashes takes only itself down.
"""

import io
import json
import os
import resource
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
VIDEO_FORMATS = {"mov": "MP4", "matroska": "WebM or Matroska"}
VIDEO_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4")
REFUSED = 3
"""Exit status: the upload is at fault, and standard error says how."""
MEMORY_BYTES = 4 * 2**30
MILLISECOND = Fraction(1, 1000)

Kind = Literal["image", "first_frame", "frames"]

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, MemoryError)
"""What PIL and libav raise on broken files."""
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
"""Hundreds of megapixels; the warning is an exception only where the process makes it one."""


class BadUpload(ValueError):
    """An upload that cannot be used; the message says why and what would do."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to make of an upload, and what it may cost."""

    kind: Kind
    width: int
    height: int
    max_pixels: int
    max_side: int
    max_seconds: float
    """Processor time."""
    fps: int = 1
    max_frames: int = 1


def decode(data: bytes, wanted: Wanted) -> bytes:
    """A PNG of exactly width x height; or, of a video's frames, their number (4 bytes) and FFV1 in Matroska."""
    if wanted.kind == "image":
        return image_png(data, wanted)
    if wanted.kind == "first_frame":
        return _png(_fitted(Image.fromarray(next(_frames(data, wanted))), wanted))
    return _continued(data, wanted)


def image_png(data: bytes, wanted: Wanted) -> bytes:
    """Turned upright, scaled to cover, cropped at the centre."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            _check_pixels(image.width, image.height, wanted, "the image")
            image.verify()
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:  # verify() leaves one that cannot be read
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except BadUpload:
        raise
    except _BOMB:
        raise BadUpload(f"the image has far more than {wanted.max_pixels} pixels; scale it down") from None
    except _UNREADABLE:
        allowed = ", ".join(IMAGE_FORMATS)
        raise BadUpload(
            f"the {len(data)} bytes are not a readable image; upload one of {allowed}, complete and undamaged"
        ) from None
    return _png(_fitted(upright, wanted))


def _check_pixels(width: int, height: int, wanted: Wanted, what: str) -> None:
    if max(width, height) > wanted.max_side:
        raise BadUpload(f"{what} is {width}x{height}, at most {wanted.max_side} a side are read; scale it down")
    if width * height > wanted.max_pixels:
        raise BadUpload(
            f"{what} has {width}x{height} = {width * height} pixels, at most {wanted.max_pixels} are read;"
            " scale it down"
        )


def _fitted(image: Image.Image, wanted: Wanted) -> Image.Image:
    size = (wanted.width, wanted.height)
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _continued(data: bytes, wanted: Wanted) -> bytes:
    """One frame at a time from decoder to encoder, so that a long video takes no more memory than a short one."""
    import av

    buffer, count = io.BytesIO(), 0
    opened: Any = av.open(buffer, "w", format="matroska")
    with opened as container:
        stream: Any = container.add_stream("ffv1", Fraction(wanted.fps))
        stream.width, stream.height, stream.pix_fmt = wanted.width, wanted.height, "bgr0"
        for pixels in _frames(data, wanted):
            image = np.asarray(_fitted(Image.fromarray(pixels), wanted))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="bgr0")))
            count += 1
        container.mux(stream.encode(None))
    return struct.pack(">I", count) + buffer.getvalue()


def _frames(data: bytes, wanted: Wanted) -> Iterator[NDArray[np.uint8]]:
    """Upright RGB frames [H, W, 3] at the wanted fps, each the one that is shown at its time. At least one."""
    import av

    try:
        with av.open(io.BytesIO(data), "r", format=_video_format(data)) as container:
            if not container.streams.video:
                raise BadUpload("the file has no video stream; upload a video")
            stream = container.streams.video[0]
            codec: Any = stream.codec_context
            if codec.name not in VIDEO_CODECS:
                raise BadUpload(f"the video is coded as {codec.name}; upload one of {', '.join(VIDEO_CODECS)}")
            _check_pixels(codec.width, codec.height, wanted, "the video")
            codec.options = {"max_pixels": str(wanted.max_pixels)}  # of a frame that says otherwise than the header
            codec.thread_count = 1
            yield from _at_fps(container.decode(stream), stream.average_rate, wanted)
    except (BadUpload, GeneratorExit):
        raise
    except _UNREADABLE:
        allowed = " or ".join(VIDEO_FORMATS.values())
        raise BadUpload(
            f"the {len(data)} bytes are not a readable video; upload {allowed}, complete and undamaged"
        ) from None


def _video_format(data: bytes) -> str:
    """By content. Named to libav, so that no playlist is followed and no other parser is tried."""
    if data[4:8] == b"ftyp":
        return "mov"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    raise BadUpload(
        f"the {len(data)} bytes are not a readable video; upload {' or '.join(VIDEO_FORMATS.values())}, complete and"
        " undamaged"
    )


def _at_fps(decoded: Iterator[Any], rate: Fraction | None, wanted: Wanted) -> Iterator[NDArray[np.uint8]]:
    """Frame k is the one that is shown k / fps after the first; times are exact."""
    shown: NDArray[np.uint8] | None = None
    count, until = 0, Fraction(0)
    for frame, start, end in _timed(decoded, rate or Fraction(wanted.fps)):
        _check_pixels(frame.width, frame.height, wanted, "a frame")
        while shown is not None and Fraction(count, wanted.fps) < start:
            yield shown
            count = _counted(count, wanted)
        shown, until = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)), end
    if shown is None:
        raise BadUpload("the video has no frame that can be read; upload one that is complete and undamaged")
    while count == 0 or Fraction(count, wanted.fps) < until:
        yield np.ascontiguousarray(shown)
        count = _counted(count, wanted)


def _timed(decoded: Iterator[Any], rate: Fraction) -> Iterator[tuple[Any, Fraction, Fraction]]:
    """Frames with the times at which they appear and go, counted from the first, and a rounding early: a clock of
    milliseconds puts 2/3 s at 667 ms, and it is meant to be there at 2/3 s."""
    first = start = Fraction(0)
    length = 1 / rate
    for index, frame in enumerate(decoded):
        tick: Fraction = frame.time_base or Fraction(0)
        time: Fraction = first + start + length if frame.pts is None else frame.pts * tick
        first = first if index else time
        start = max(start, time - first)
        length: Fraction = frame.duration * tick if frame.duration else 1 / rate
        rounding = min(tick, MILLISECOND)
        yield frame, start - rounding, start + length - rounding


def _counted(count: int, wanted: Wanted) -> int:
    if count + 1 > wanted.max_frames and wanted.kind == "frames":
        raise BadUpload(
            f"the video is longer than {wanted.max_frames} frames at {wanted.fps} a second; cut it, or ask for a lower"
            " fps"
        )
    return count + 1


def main() -> int:
    """Wanted as JSON in the first argument, the upload on standard input, what became of it on standard output."""
    wanted = Wanted(**json.loads(sys.argv[1]))
    seconds = int(wanted.max_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        result = decode(sys.stdin.buffer.read(), wanted)
    except BadUpload as error:
        os.write(2, str(error).encode())
        return REFUSED
    sys.stdout.buffer.write(result)
    return 0


def arguments(wanted: Wanted) -> list[str]:
    """The command that runs this file for one upload, cut off from the environment and from our packages."""
    return [sys.executable, "-I", __file__, json.dumps(asdict(wanted))]


if __name__ == "__main__":
    sys.exit(main())
