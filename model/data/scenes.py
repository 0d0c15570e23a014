"""Scenes: cuts a video file at its shot changes and decodes each piece to small RGB frames.

It owns what counts as a readable video and where a shot ends; it knows nothing of captions or shards. A file is decoded
twice: the first pass finds the cuts and every reason to refuse the file, so that no frame of a bad file is ever handed
out, and the second keeps at most one segment in memory.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from pydantic import Field
from scenedetect import ContentDetector, FrameTimecode  # pyright: ignore[reportMissingTypeStubs]

from model.config import Config, Positive

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

_OPEN_OPTIONS = {
    # A file named .mp4 may hold a playlist that points elsewhere: only real containers, only this file.
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts",
    "protocol_whitelist": "file",
}
_DETECTION_SIDE = 256
"""Longer side of the frames that are compared; PySceneDetect's own choice, for which its threshold is meant."""
_MISSING_SECONDS = 0.5
"""A stream that ends this much before its declared end has lost its tail."""
_UNSPECIFIED_COLORSPACE = 2
_HD_SIDE = 720


class VideoError(ValueError):
    """A file that cannot be used as video: the message names it and the reason."""

    def __init__(self, path: Path, reason: str, kind: str = "unreadable") -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.kind = kind
        """One word or two that like reasons share, to count by."""


class SceneConfig(Config):
    """How videos are cut and at which size they are kept."""

    threshold: Annotated[float, Field(gt=0)] = 27.0
    """ContentDetector: mean change of hue, saturation and brightness (0 to 255) that makes a cut."""
    min_scene_len: Positive = 15
    """Frames between two cuts, at least."""
    short_side: Annotated[int, Field(ge=16, multiple_of=2)] = 64
    """Stored pixels along the shorter side; the longer one keeps the aspect and is even."""
    max_frames: Positive = 48
    """A longer scene is split into segments of nearly equal length, none longer than this."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One segment of one shot."""

    frames: npt.NDArray[np.uint8]
    """uint8 [T, h, w, 3] at the stored size."""
    fps: float
    source: str
    """Name of the file."""
    start_seconds: float
    end_seconds: float
    original_height: int
    """Height and width as a player shows them, before the resize."""
    original_width: int


@dataclass(frozen=True, slots=True)
class Picture:
    """How the frames of a file are shown, taken from the first: the size with square pixels, upright, and the turn."""

    height: int
    width: int
    quarter_turns: int
    reformatter: VideoReformatter = field(default_factory=VideoReformatter, compare=False, repr=False)
    """One for all frames: each would set up a conversion of its own."""

    @classmethod
    def of(cls, frame: VideoFrame, pixel_aspect: float) -> Self:
        height, width = frame.height, max(1, round(frame.width * pixel_aspect))
        turns = frame.rotation // 90
        return cls(width, height, turns) if turns % 2 else cls(height, width, turns)

    def drawn(self, frame: VideoFrame, *, scale: float, pixels: Literal["rgb24", "bgr24"]) -> npt.NDArray[np.uint8]:
        """uint8 [h, w, 3] at even sides nearest to `scale` times the shown ones."""
        height, width = (max(2, 2 * round(side * scale / 2)) for side in (self.height, self.width))
        if self.quarter_turns % 2:
            height, width = width, height
        # Untagged HD video is BT.709 by convention; FFmpeg would take it for BT.601 and shift every hue.
        untagged_hd = frame.colorspace == _UNSPECIFIED_COLORSPACE and min(self.height, self.width) >= _HD_SIDE
        scaled = cast(Any, self.reformatter).reformat(
            frame,
            width=width,
            height=height,
            format=pixels,
            interpolation="AREA",
            src_colorspace="ITU709" if untagged_hd else None,
            threads=1,
        )
        array = scaled.to_ndarray()
        return np.ascontiguousarray(np.rot90(cast(npt.NDArray[np.uint8], array), self.quarter_turns))


@dataclass(frozen=True, slots=True)
class _Cuts:
    """What the first pass learns: frame times (one more than frames: the end) and the segments [start, stop)."""

    picture: Picture
    fps: float
    times: list[float]
    segments: list[tuple[int, int]]


def find_videos(folder: Path) -> list[Path]:
    """The video files of `folder`, in order of name; sub-folders are not entered."""
    if not folder.is_dir():
        raise VideoError(folder, f"no such folder; give a folder with video files ({' '.join(VIDEO_SUFFIXES)})")
    entries = sorted(folder.iterdir())
    videos = [path for path in entries if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        what = f"none of its {len(entries)} entries is a video" if entries else "the folder is empty"
        raise VideoError(folder, f"{what}; put in files that end in one of {' '.join(VIDEO_SUFFIXES)}")
    return videos


def read_scenes(path: Path, config: SceneConfig | None = None) -> Iterator[Scene]:
    """The segments of a video file in order; `VideoError` comes before the first of them."""
    config = config or SceneConfig()
    cuts = _find_cuts(path, config)
    picture = cuts.picture
    scale = config.short_side / min(picture.height, picture.width)
    with closing(decode_frames(path)) as decoded:
        for start, stop in cuts.segments:
            frames = [picture.drawn(frame, scale=scale, pixels="rgb24") for frame in islice(decoded, stop - start)]
            yield Scene(
                frames=np.stack(frames),
                fps=cuts.fps,
                source=path.name,
                start_seconds=cuts.times[start],
                end_seconds=cuts.times[stop],
                original_height=picture.height,
                original_width=picture.width,
            )


def read_frames(path: Path, *, height: int, width: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Every frame [height, width, 3] of a video file, scaled to cover that size and cropped at the centre."""
    with open_video(path) as container:
        pixel_aspect = float(video_stream(container, path).sample_aspect_ratio or 1)
    picture: Picture | None = None
    for frame in decode_frames(path):
        picture = picture or Picture.of(frame, pixel_aspect)
        scale = max(height / picture.height, width / picture.width)
        drawn = picture.drawn(frame, scale=scale, pixels="rgb24")
        top, left = (drawn.shape[0] - height) // 2, (drawn.shape[1] - width) // 2
        yield drawn[top : top + height, left : left + width]
    if picture is None:
        raise VideoError(path, "no frame could be decoded", "no_frames")


def _find_cuts(path: Path, config: SceneConfig) -> _Cuts:
    with open_video(path) as container:
        stream = video_stream(container, path)
        rate = Fraction(stream.average_rate or stream.guessed_rate or 0)
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        declared = declared_seconds(stream)
    if not rate:
        raise VideoError(path, "the stream declares no frame rate")
    detector = ContentDetector(threshold=config.threshold, min_scene_len=config.min_scene_len)
    picture: Picture | None = None
    bounds, times, end = [0], list[float](), 0.0
    for index, frame in enumerate(decode_frames(path)):
        picture = picture or Picture.of(frame, pixel_aspect)
        start = float(index / rate if frame.pts is None else frame.time)
        end = start + float(frame.duration * (frame.time_base or 0) or 1 / rate)
        times.append(start)
        scale = min(1.0, _DETECTION_SIDE / max(picture.height, picture.width))
        image = picture.drawn(frame, scale=scale, pixels="bgr24")
        bounds.extend(cut.frame_num for cut in detector.process_frame(FrameTimecode(index, rate), image))
    if picture is None:
        raise VideoError(path, "no frame could be decoded", "no_frames")
    seconds = end - times[0]
    if declared is not None and seconds < declared - _MISSING_SECONDS:
        raise VideoError(
            path, f"cut short: {declared:.2f} s declared, {seconds:.2f} s decoded; get a whole copy", "truncated"
        )
    scenes = pairwise([*bounds, len(times)])
    segments = [segment for start, stop in scenes for segment in _split(start, stop, config.max_frames)]
    return _Cuts(picture, float(rate), [time - times[0] for time in [*times, end]], segments)


def _split(start: int, stop: int, max_frames: int) -> Iterator[tuple[int, int]]:
    parts = -(-(stop - start) // max_frames)
    return pairwise(start + (stop - start) * part // parts for part in range(parts + 1))


def open_video(path: Path) -> InputContainer:
    if not path.is_file():
        raise VideoError(path, "no such file")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise VideoError(path, f"'{path.suffix}' is not a video suffix; accepted are {' '.join(VIDEO_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise VideoError(path, "the file is empty (0 bytes)", "empty_file")
    try:
        return av.open(str(path.absolute()), mode="r", options=_OPEN_OPTIONS)
    except (FFmpegError, UnicodeDecodeError) as error:
        raise VideoError(path, f"not a readable video container: {_reason(error)}") from error


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first moving picture; the cover image of an audio file is not one."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    held = sorted({stream.type for stream in container.streams}) or ["nothing"]
    raise VideoError(path, f"no video stream in it, only {', '.join(held)}", "no_video")


def declared_seconds(stream: VideoStream) -> float | None:
    """How long the stream says it is: in its header (mp4, avi) or in a tag (Matroska); None if it does not."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]) if tag else None


def decode_frames(path: Path, threads: int | None = None) -> Generator[VideoFrame]:
    """Every frame of the file; damage that FFmpeg notices is an error, where a player would conceal it."""
    with open_video(path) as container:
        stream = video_stream(container, path)
        if threads is not None:
            stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        count = 0
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise VideoError(path, f"damaged or cut short after {count} frames; get a whole copy", "damaged")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise VideoError(path, f"frame {count} is damaged; get a whole copy", "damaged")
                    count += 1
                    yield frame
        except FFmpegError as error:
            raise VideoError(path, f"decoding failed after {count} frames: {_reason(error)}", "damaged") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, FFmpegError) else None) or str(error)
