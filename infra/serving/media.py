"""Frames become files: mp4, thumbnail, sprite sheet, and what a job starts from, which is read back.

It owns formats; it knows nothing of jobs, latents, uploads (`safety`) or where files are kept.
"""

import io
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from PIL import Image

from infra.serving.provenance import Provenance
from model.generation import Clip

BLANK_DEVIATION = 0.5
"""Of the pixels of a frame, in every channel, in 255ths: below it there is nothing to be seen."""


def read_image(data: bytes) -> Clip:
    """A stored conditioning image as one frame [1, H, W, 3]."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))[None]


def write_frames(path: Path, clip: Clip, fps: int) -> None:
    """A clip that a job continues, without loss: FFV1 in Matroska."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", Fraction(fps))  # pyright: ignore[reportUnknownMemberType]
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "bgr0"
        for pixels in clip:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            _write_frame(container, stream, frame.reformat(format="bgr0"))
        _write_frame(container, stream, None)


def read_frames(data: bytes) -> Clip:
    """What `write_frames` wrote [F, H, W, 3]."""
    with av.open(io.BytesIO(data), "r", format="matroska") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(np.uint8, copy=False)


def write_mp4(path: Path, clip: Clip, fps: int, *, provenance: Provenance | None = None) -> None:
    """H.264 as every player reads it: yuv420p, BT.709, index at the front, `provenance` as its comment."""
    height, width = clip.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width}x{height} cannot be yuv420p video: both sides must be even")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        options = {"crf": "16", "preset": "medium"}
        stream = container.add_stream("libx264", Fraction(fps), options)  # pyright: ignore[reportUnknownMemberType]
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # the same frames give the same bytes on every machine
        stream.codec_context.colorspace = Colorspace.ITU709
        if provenance is not None:
            container.metadata["comment"] = provenance.as_json()
        for pixels in clip:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            _write_frame(container, stream, frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709))
        _write_frame(container, stream, None)


def _write_frame(container: OutputContainer, stream: VideoStream, frame: av.VideoFrame | None) -> None:
    """None writes what the encoder still holds back."""
    container.mux(stream.encode(frame))  # pyright: ignore[reportUnknownMemberType]


def png(clip: Clip) -> bytes:
    """The first frame, without loss."""
    return _encoded(Image.fromarray(clip[0]), "PNG")


def thumbnail(clip: Clip, *, provenance: Provenance | None = None) -> bytes:
    """The first frame as WebP."""
    return _encoded(Image.fromarray(clip[0]), "WEBP", provenance)


def blank_frames(clip: Clip) -> int:
    """How many frames are one colour all over."""
    flat = clip.reshape(len(clip), -1, clip.shape[-1]).astype(np.float32)
    return int((flat.std(axis=1).max(axis=1) < BLANK_DEVIATION).sum())


def spritesheet(clip: Clip, *, provenance: Provenance | None = None) -> bytes:
    """All frames in reading order on a nearly square sheet, as JPEG."""
    count, height, width = clip.shape[:3]
    columns = math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height))
    for index, pixels in enumerate(clip):
        sheet.paste(Image.fromarray(pixels), (index % columns * width, index // columns * height))
    return _encoded(sheet, "JPEG", provenance)


def _encoded(image: Image.Image, format: str, provenance: Provenance | None = None) -> bytes:
    buffer = io.BytesIO()
    said = {} if provenance is None else {"xmp": provenance.as_xmp()}
    image.save(buffer, format, quality=90, **said)
    return buffer.getvalue()
