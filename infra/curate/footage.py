"""Footage: one pass over a video file, as upright RGB frames on a regular grid in time.

It owns which files are refused and why, and what a variable frame rate becomes; it does not know where shots end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame

from infra.curate.recipe import CutConfig, LimitsConfig
from model.data.scenes import Picture, VideoError, declared_seconds, decode_frames, open_video, video_stream

Frame = npt.NDArray[np.uint8]

_HDR = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
"""Transfer characteristics (ITU-T H.273) whose values, taken for ordinary video, look grey."""
_MISSING_SECONDS = 0.5
"""A stream that ends this much before its declared end has lost its tail."""


@dataclass(frozen=True, slots=True)
class Footage:
    """A file that passed the checks of its header."""

    path: Path
    rate: Fraction
    """Frames a second that the stream declares, on average."""
    pixel_aspect: float
    declared: float | None
    """Seconds."""

    @classmethod
    def of(cls, path: Path, limits: LimitsConfig) -> "Footage":
        """Look into the header; `VideoError` says what is wrong and with which limit."""
        size = path.stat().st_size
        if size > limits.max_bytes:
            raise VideoError(path, f"{size} bytes are more than limits.max_bytes {limits.max_bytes}", "too_large")
        with open_video(path) as container:
            stream = video_stream(container, path)
            rate = Fraction(stream.average_rate or stream.guessed_rate or 0)
            side = max(stream.width, stream.height)
            declared = declared_seconds(stream)
            if declared is None and container.duration:
                declared = container.duration / 1_000_000
            aspect = float(stream.sample_aspect_ratio or 1)
        if not rate:
            raise VideoError(path, "the stream declares no frame rate", "no_frame_rate")
        if rate < limits.min_fps:
            raise VideoError(path, f"{float(rate):.3g} frames/s are below limits.min_fps {limits.min_fps}", "slow")
        if side > limits.max_side:
            raise VideoError(path, f"{side} pixels are more than limits.max_side {limits.max_side}", "too_large")
        if declared is not None and declared > limits.max_seconds:
            raise VideoError(
                path, f"{declared:.0f} s are more than limits.max_seconds {limits.max_seconds}", "too_long"
            )
        return cls(path, rate, aspect, declared)

    def fps(self, cut: CutConfig) -> float:
        """Of the grid: the stream's own rate, divided by a whole number where it is above `max_fps`."""
        return float(self.rate / max(1, -(-self.rate // Fraction(cut.max_fps).limit_denominator(1000))))


@dataclass(frozen=True, slots=True)
class Moment:
    """A frame of the grid."""

    pixels: Frame
    """uint8 [h, w, 3], RGB, at the stored size."""
    picture: Picture
    """Size as shown, before the resize."""


def moments(footage: Footage, cut: CutConfig, limits: LimitsConfig, threads: int | None = None) -> Iterator[Moment]:
    """The frames at 0, 1/fps, 2/fps, …: each the last one shown at that time; every frame is decoded once.

    A frame that is shown longer is repeated, one that no time of the grid falls to is not converted. Frames before
    damage were handed out by the time that `VideoError` tells of it, so who takes them keeps none until the end.
    """
    fps, path = footage.fps(cut), footage.path
    held: VideoFrame | None = None
    picture: Picture | None = None
    first = shown = end = 0.0
    count = 0
    for index, frame in enumerate(decode_frames(path, threads)):
        if picture is None:
            _refuse_hdr(path, frame)
            picture = Picture.of(frame, footage.pixel_aspect)
            first = _time(frame, index, footage)
        shown = _time(frame, index, footage) - first
        if shown > limits.max_seconds:
            raise VideoError(path, f"longer than limits.max_seconds {limits.max_seconds}", "too_long")
        due = _due(shown, fps, count)
        if held is not None and due:
            yield from _repeated(held, picture, cut, due)
            count += due
        held = frame
        end = shown + (float(frame.duration * (frame.time_base or 0)) or 1 / float(footage.rate))
    if held is None or picture is None:
        raise VideoError(path, "no frame could be decoded", "no_frames")
    if footage.declared is not None and end < footage.declared - _MISSING_SECONDS:
        raise VideoError(path, f"{footage.declared:.2f} s declared, {end:.2f} s decoded; get a whole copy", "truncated")
    yield from _repeated(held, picture, cut, max(_due(end, fps, count), 1 if count == 0 else 0))


def _due(until: float, fps: float, count: int) -> int:
    """Times of the grid before `until` that no frame was given for yet; rounding of time stamps moves none."""
    return max(0, int(np.ceil(until * fps - 0.01)) - count)


def _repeated(frame: VideoFrame, picture: Picture, cut: CutConfig, times: int) -> Iterator[Moment]:
    scale = min(1.0, cut.short_side / min(picture.height, picture.width))
    moment = Moment(picture.drawn(frame, scale=scale, pixels="rgb24"), picture)
    for _ in range(times):
        yield moment


def _time(frame: VideoFrame, index: int, footage: Footage) -> float:
    return float(index / footage.rate if frame.pts is None else frame.time)


def _refuse_hdr(path: Path, frame: VideoFrame) -> None:
    transfer = int(cast(Any, frame).color_trc)
    if transfer in _HDR:
        raise VideoError(path, f"HDR video, {_HDR[transfer]}: map it to BT.709 first", "hdr")
