"""Sample pictures of the results page: a row of the table a line, the frames of two clips beside its title.

It owns the layout; clips are read from the runs' folders, as `measure` left them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.miniature.rows import Row
from benchmarks.miniature.runs import Workplace

SIDE, GAP, LABEL, CLIPS = 40, 6, 330, 2


def samples_picture(rows: Sequence[Row], seed: int, place: Workplace, path: Path) -> None:
    """A PNG of the first clips of each row; rows of several tasks have a line a task."""
    lines = [line for row in rows for line in _lines(row, place.samples(row.name, seed))]
    width = max(strip.width for _, strip in lines)
    canvas = Image.new("RGB", (LABEL + width, len(lines) * (SIDE + GAP) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (title, strip) in enumerate(lines):
        top = GAP + index * (SIDE + GAP)
        pen.text((6, top + SIDE // 2 - 6), title, fill="black")
        canvas.paste(strip, (LABEL, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(64).save(path, optimize=True)


def _lines(row: Row, folder: Path) -> list[tuple[str, Image.Image]]:
    tasks = [task for task in ("t2i", "t2v", "ti2v") if (folder / f"{task}.npy").exists()]
    return [(f"{row.name}  {task}", _strip(np.load(folder / f"{task}.npy"))) for task in tasks]


def _strip(clips: np.ndarray) -> Image.Image:
    """uint8 [N, T, H, W, 3]: frames of the first clips from left to right; still images show more of them."""
    shown = clips[:CLIPS] if clips.shape[1] > 1 else clips
    frames = shown.shape[1]
    strip = Image.new("RGB", (len(shown) * (frames * (SIDE + 1) + 2 * GAP), SIDE), "white")
    for place, clip in enumerate(shown):
        left = place * (frames * (SIDE + 1) + 2 * GAP)
        for index, frame in enumerate(clip):
            picture = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            strip.paste(picture, (left + index * (SIDE + 1), 0))
    return strip
