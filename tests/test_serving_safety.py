"""Uploads that are bombs, and a moderator that breaks."""

import contextlib
import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.serving import media
from infra.serving.limits import ServingLimits
from infra.serving.safety import uploads
from infra.serving.safety.decoding import BadUpload, Wanted, decode
from infra.serving.safety.moderation import CommandModerator, ModerationUnavailable, Refused
from tests.tiny_server import CLIP, encoded, request, tiny_recipe

LIMITS = ServingLimits.of(tiny_recipe()).model_copy(update={"max_image_pixels": 1_000_000, "max_source_frames": 16})
REQUEST = request()


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG that says what it likes about itself."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def video(folder: Path, count: int, size: int = 32) -> bytes:
    path = folder / "clip.mp4"
    media.write_mp4(path, np.zeros((count, size, size, 3), np.uint8), 8)
    return path.read_bytes()


def test_image_bombs_are_refused_unread() -> None:
    bombs = {
        "60000 a side": png(60_000, 60_000, zlib.compress(bytes(60_001) * 200)),
        "100000 wide": png(100_000, 1, zlib.compress(bytes(100_001))),
        "a million pixels more than it may have": png(2000, 1000, zlib.compress(bytes(2001) * 1000)),
        "rows that never end": png(100, 100, zlib.compress(bytes(200_000_000), 9)),
    }
    for name, bomb in bombs.items():
        assert len(bomb) < 400_000, name
    for name in list(bombs)[:3]:
        with pytest.raises(BadUpload, match=r"a side are read|pixels"):
            uploads.first_frame(bombs[name], REQUEST, LIMITS)
    start = time.monotonic()
    with contextlib.suppress(BadUpload):
        uploads.first_frame(bombs["rows that never end"], REQUEST, LIMITS)
    assert time.monotonic() - start < 60


def test_long_and_large_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadUpload, match="longer than 16 frames at 8 a second"):
        uploads.source_frames(video(tmp_path, 40), REQUEST, LIMITS)
    with pytest.raises(BadUpload, match="1200x1200 = 1440000 pixels"):
        uploads.source_frames(video(tmp_path, 2, size=1200), REQUEST, LIMITS)
    with pytest.raises(BadUpload, match="not a readable video"):
        uploads.source_frames(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", REQUEST, LIMITS)


def test_a_decoder_that_takes_too_long_is_stopped() -> None:
    big = encoded(np.random.default_rng(0).integers(0, 255, (900, 1000, 3), dtype=np.uint8))
    slow = LIMITS.model_copy(update={"max_decode_s": 0.001})
    with pytest.raises(BadUpload, match=r"more than 0\.001 s"):
        uploads.first_frame(big, REQUEST, slow)


def test_every_flipped_byte_of_a_video_is_either_read_or_refused(tmp_path: Path) -> None:
    good = video(tmp_path, 4)
    wanted = Wanted("frames", 32, 32, max_pixels=10_000, max_side=1000, max_seconds=5, fps=8, max_frames=16)
    for position in range(0, len(good), 41):
        data = bytearray(good)
        data[position] ^= 0xFF
        try:
            assert decode(bytes(data), wanted)
        except BadUpload:
            continue


def test_a_moderator_that_breaks_lets_nothing_through() -> None:
    judge = "import json,sys; text = json.load(sys.stdin)['text']; print(json.dumps({'allowed': 'bad' not in text}))"
    moderator = CommandModerator(("python3", "-c", judge))
    moderator.check(text="good")
    with pytest.raises(Refused):
        moderator.check(text="bad")
    for broken in (("false",), ("echo", "{}"), ("echo", '{"allowed": "yes"}'), ("/nonexistent",)):
        with pytest.raises((ModerationUnavailable, Refused)):
            CommandModerator(broken).check(text="good")


def test_a_picture_without_loss_survives_its_store() -> None:
    picture = Image.open(io.BytesIO(uploads.first_frame(encoded(CLIP[0]), REQUEST, LIMITS)))
    assert np.array_equal(np.asarray(picture), CLIP[0])
