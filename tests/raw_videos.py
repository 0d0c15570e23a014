"""Raw videos for the data engine, whole and broken, made here with PyAV; it knows nothing of what becomes of them."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]


def texture(count: int, *, seed: int = 0, step: int = 2, height: int = 64, width: int = 96) -> Frames:
    """Coloured noise that drifts by `step` pixels a frame; every seed looks different."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(30, 226, size=(height // 8, width // 8, 3), dtype=np.uint8)
    image = cells.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(image, step * index, axis=1) for index in range(count)])


def write_video(
    path: Path,
    frames: Frames,
    *,
    fps: int = 10,
    rotation: int = 0,
    transfer: int | None = None,
    times: Sequence[int] | None = None,
) -> Path:
    """H.264 in the container that the name asks for; `times` are milliseconds of each frame, for a variable rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4" if path.suffix == ".mp4" else None) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"preset": "ultrafast", "threads": "1"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            if transfer is not None:
                frame.color_trc = transfer
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sidecar(video: Path, **facts: object) -> None:
    told = {"licence": "CC0", "credit": "nobody", "source": "films"} | facts
    video.with_name(video.name + ".json").write_text(json.dumps(told))


def write_bad_corpus(folder: Path) -> dict[str, str]:
    """Files that cannot be used, and the reason each is to be counted with."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = write_video(folder / "whole.mp4", texture(30, seed=50)).read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "headless.mp4").write_bytes(whole[: len(whole) // 2])  # its index was at the end
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n")
    (folder / "picture.mkv").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    write_sound(folder / "sound.mp4")
    write_video(folder / "hdr.mp4", texture(12, seed=51), transfer=16)
    write_video(folder / "slow.mp4", texture(12, seed=52), fps=1)
    write_video(folder / "endless.mkv", texture(2, seed=53), fps=10, times=[0, 36_000_000])
    cut = write_video(folder / "tail.mkv", texture(60, seed=54))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    return {
        "zero": "empty_file",
        "headless": "unreadable",
        "playlist": "unreadable",
        "picture": "unreadable",
        "sound": "no_video",
        "hdr": "hdr",
        "slow": "slow",
        "endless": "too_long",
        "tail": "truncated",
    }
