"""Uploads are read in a process of their own, under limits of time and memory.

It owns that process and what its end means; it knows nothing of formats (`decoding`) or of HTTP.
"""

import logging
import signal
import struct
import subprocess
import threading
from dataclasses import dataclass

from infra.serving.limits import ServingLimits, VideoRequest
from infra.serving.safety import decoding
from infra.serving.safety.decoding import BadUpload, Wanted

logger = logging.getLogger(__name__)

AT_ONCE = 2
"""Decoders of this process; further uploads wait their turn."""
_turns = threading.Semaphore(AT_ONCE)


@dataclass(frozen=True, slots=True)
class SourceFrames:
    """Frames that a video continues, as `media.read_frames` reads them."""

    data: bytes
    count: int


def first_frame(upload: bytes, request: VideoRequest, limits: ServingLimits, *, video: bool = False) -> bytes:
    """A PNG of exactly the asked size, from an image or from the start of a video. BadUpload if there is none in it."""
    return _decoded(upload, _wanted("first_frame" if video else "image", request, limits), limits)


def source_frames(upload: bytes, request: VideoRequest, limits: ServingLimits) -> SourceFrames:
    """All frames of a video at the asked size and fps."""
    result = _decoded(upload, _wanted("frames", request, limits), limits)
    return SourceFrames(data=result[4:], count=struct.unpack(">I", result[:4])[0])


def _wanted(kind: decoding.Kind, request: VideoRequest, limits: ServingLimits) -> Wanted:
    return Wanted(
        kind=kind,
        width=request.width,
        height=request.height,
        max_pixels=limits.max_image_pixels,
        max_side=limits.max_image_side,
        max_seconds=limits.max_decode_s,
        fps=request.fps,
        max_frames=limits.max_source_frames,
    )


def _decoded(upload: bytes, wanted: Wanted, limits: ServingLimits) -> bytes:
    too_long = BadUpload(
        f"reading the upload takes more than {limits.max_decode_s:g} s; send one that is smaller or coded more simply"
    )
    with _turns:
        try:
            done = subprocess.run(
                decoding.arguments(wanted),
                input=upload,
                capture_output=True,
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                timeout=4 * limits.max_decode_s,
            )
        except subprocess.TimeoutExpired:
            raise too_long from None
    if done.returncode == decoding.REFUSED:
        raise BadUpload(done.stderr.decode(errors="replace"))
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise too_long
    if done.returncode != 0:
        logger.warning("the decoder ended with %s: %s", done.returncode, done.stderr[-2000:].decode(errors="replace"))
        raise BadUpload("the upload breaks the decoder; send it in another format")
    return done.stdout
