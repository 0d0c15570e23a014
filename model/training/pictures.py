"""Pictures of drawn clips for people: a grid of all frames, and a wall of clips that moves.

It owns the layout; it knows nothing of what the clips are measured by.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from model.generation import Clip

LEGIBLE = 64
"""Pixels of width that small frames are enlarged to."""
CAPTION_WIDTH, CAPTION_LETTERS = 190, 36


def sample_grid(strips: list[tuple[str, list[Clip]]], captions: Sequence[str], path: Path, rows: int = 12) -> None:
    """One picture: a caption a row, every frame of the clip beside it, a block a task."""
    gap = 4
    frames, height, width = (int(size) for size in strips[0][1][0].shape[:3])
    scale = _scale(width)
    height, width = height * scale, width * scale
    shown = min(rows, len(captions))
    block = CAPTION_WIDTH + frames * (width + 2)
    canvas = Image.new("RGB", (block * len(strips), shown * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (task, clips) in enumerate(strips):
        for row, clip in enumerate(clips[:shown]):
            top = row * (height + gap)
            text = textwrap.fill(f"{task}: {captions[row]}", CAPTION_LETTERS, max_lines=max(1, height // 12))
            pen.text((column * block + 6, top + height // 2 - 6 * (1 + text.count("\n"))), text, fill="black")
            for index, frame in enumerate(clip):
                picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(picture, (column * block + CAPTION_WIDTH + index * (width + 2), top))
    canvas.save(path)


def animate(clips: list[Clip], path: Path, *, fps: int, columns: int = 8) -> None:
    """The clips side by side as one looping WebP."""
    rows = -(-len(clips) // columns)
    side = clips[0].shape[1:3]
    scale = _scale(side[1])
    frames: list[Image.Image] = []
    for index in range(clips[0].shape[0]):
        wall = np.full((rows * (side[0] + 2), columns * (side[1] + 2), 3), 255, dtype=np.uint8)
        for place, clip in enumerate(clips):
            top, left = place // columns * (side[0] + 2), place % columns * (side[1] + 2)
            wall[top : top + side[0], left : left + side[1]] = clip[index]
        picture = Image.fromarray(wall)
        frames.append(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, lossless=True)


def _scale(width: int) -> int:
    return max(1, LEGIBLE // width)
