"""Encoded clips: frames to an mp4 and back, only those frames that are wanted.

It owns how a stored clip is compressed; it knows nothing of shards or of what is cut from a clip. Every frame lasts
`_TICKS` ticks and none refers to a later one, so a frame's number is in its time stamp and a frame is reached from the
key frame before it.
"""

import io
from collections.abc import Iterator, Sequence, Set
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from pydantic import Field

from model.config import Config, Positive

_TICKS = 512
_READ_OPTIONS = {"format_whitelist": "mov", "protocol_whitelist": "file"}


class Encoding(Config):
    """H.264 in an mp4, 4:2:0."""

    crf: Annotated[int, Field(ge=0, le=51)] = 18
    """x264's constant rate factor; below 18 a loss is hard to see, every 6 more halve the bytes."""
    keyframe_every: Positive = 12
    """Frames from one key frame to the next: fewer make random access quicker and files larger."""


class Undecodable(ValueError):
    """Bytes that are not a whole clip as `encode` writes it."""


def encode(frames: npt.NDArray[np.uint8], fps: float, encoding: Encoding) -> bytes:
    """The mp4 of `frames` uint8 [T, H, W, 3] with even sides; equal frames give equal bytes."""
    height, width = cast(tuple[int, int], frames.shape[1:3])
    if height % 2 or width % 2:
        raise ValueError(f"frames of {height}x{width} cannot be encoded: both sides must be even; store them raw")
    file = io.BytesIO()
    ticks_a_second = max(1, round(fps * _TICKS))
    with av.open(file, "w", format="mp4", options={"video_track_timescale": str(ticks_a_second)}) as container:
        stream: Any = cast(Any, container).add_stream("libx264", rate=Fraction(ticks_a_second, _TICKS))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, ticks_a_second)
        every = str(encoding.keyframe_every)
        # One thread: with more, x264 places its slices by the number of cores.
        stream.options = {"crf": str(encoding.crf), "g": every, "keyint_min": every, "bf": "0", "threads": "1"}
        for index, pixels in enumerate(frames):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = index * _TICKS, Fraction(1, ticks_a_second)
            cast(Any, container).mux(stream.encode(frame))
        cast(Any, container).mux(stream.encode(None))
    return file.getvalue()


def decode(data: bytes, places: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Frames uint8 [len(places), H, W, 3] of an mp4 that `encode` wrote; no other group of pictures is decoded."""
    rows: dict[int, list[int]] = {}
    for row, place in enumerate(places):
        rows.setdefault(place, []).append(row)
    try:
        with av.open(io.BytesIO(data), "r", format="mov", options=_READ_OPTIONS) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise Undecodable("no video stream in it")
            stream.codec_context.thread_count = 1  # the processes of a loader are its threads
            pictures = np.empty((len(places), stream.height, stream.width, 3), np.uint8)
            reformatter = VideoReformatter()  # one for all frames: each would set up a conversion of its own
            for frame in _decoded(stream.codec_context, list(container.demux(stream)), rows.keys()):
                if frame.is_corrupt or frame.pts is None:
                    raise Undecodable(f"the frame at {frame.pts} is damaged")
                if found := rows.pop(frame.pts // _TICKS, None):
                    pictures[found] = _rgb(reformatter.reformat(frame, format="rgb24"))
    except (FFmpegError, ValueError) as error:
        raise Undecodable(str(error)) from error
    if rows:
        raise Undecodable(f"frames {sorted(rows)} cannot be decoded")
    return pictures


def _decoded(codec: Any, packets: list[Any], wanted: Set[int]) -> Iterator[VideoFrame]:
    """Every wanted frame, and those between it and the key frame before it."""
    numbers = [None if packet.pts is None else packet.pts // _TICKS for packet in packets]
    starts = [at for at, packet in enumerate(packets) if packet.is_keyframe]
    runs = [
        (start, last)
        for start, stop in pairwise([*starts, len(packets)])
        if (last := max((at for at in range(start, stop) if numbers[at] in wanted), default=None)) is not None
    ]
    for place, (start, last) in enumerate(runs):
        for packet in packets[start : last + 1]:
            yield from codec.decode(packet)
        # A decoder may hold frames back; where the next group follows without a gap, it goes on by itself.
        if place + 1 == len(runs) or runs[place + 1][0] != last + 1:
            yield from codec.decode(None)
            codec.flush_buffers()


def _rgb(frame: VideoFrame) -> npt.NDArray[np.uint8]:
    """The pixels of an RGB frame, in its own memory."""
    plane = frame.planes[0]
    lines = np.frombuffer(memoryview(cast(Any, plane)), np.uint8).reshape(frame.height, plane.line_size)
    return lines[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)
