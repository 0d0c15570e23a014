"""A parity report as one picture: the error along each trajectory, and the frames of both engines side by side.

It owns the drawing; it knows nothing of how the figures came about.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from export.parity.report import ParityReport
from model.generation import Clip

Frames = tuple[list[Clip], list[Clip]]
"""Clips of the reference and of the engine, in the same order; empty where there was no codec."""
WIDTH, HEIGHT, MARGIN = 760, 320, 54
GAIN = 16
"""What the difference of two frames is multiplied by to be seen."""
LEGIBLE = 64
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2")


def draw(report: ParityReport, frames: Frames, path: Path) -> None:
    """Write a PNG."""
    chart, strips = _chart(report), [_strip(*pair) for pair in zip(*frames, strict=True)]
    parts = [chart, *strips]
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")


def _chart(report: ParityReport) -> Image.Image:
    """Relative error of the latents after each step, a line a trajectory, on a logarithmic scale; dashes: the bound."""
    lines = report.trajectories
    canvas = Image.new("RGB", (WIDTH, HEIGHT + 14 * len(lines)), "white")
    pen = ImageDraw.Draw(canvas)
    values = [_power(error) for line in lines for error in line.errors] + [_power(report.bounds.trajectory_error)]
    low, high = math.floor(min(values)), math.ceil(max(values) + 1e-9)

    def place(step: float, power: float) -> tuple[float, float]:
        """`step` from 0 to 1."""
        height = (power - low) / max(1, high - low)
        return MARGIN + step * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - height * (HEIGHT - 2 * MARGIN)

    pen.text((MARGIN, 8), f"relative error of the latents along the trajectory ({report.precision})", fill="black")
    for power in range(low, high + 1):
        pen.line((place(0, power), place(1, power)), fill="#dddddd")
        pen.text((8, place(0, power)[1] - 6), f"1e{power}", fill="black")
    pen.text((WIDTH // 2 - 40, HEIGHT - MARGIN + 8), "first to last step", fill="black")
    bound = _power(report.bounds.trajectory_error)
    for dash in range(0, 40, 2):
        pen.line((place(dash / 40, bound), place((dash + 1) / 40, bound)), fill="black")
    for index, line in enumerate(lines):
        colour, steps = COLOURS[index % len(COLOURS)], max(1, len(line.errors) - 1)
        points = [place(step / steps, _power(error)) for step, error in enumerate(line.errors)]
        pen.line(points, fill=colour, width=2)
        decoded = "" if line.psnr_db is None else f", {line.psnr_db:.1f} dB"
        label = f"{line.shape}: {len(line.errors)} steps, {line.errors[-1]:.1e}{decoded}"
        pen.text((MARGIN, HEIGHT - 16 + 14 * index), label, fill=colour)
    return canvas


def _strip(reference: Clip, engine: Clip) -> Image.Image:
    """Three rows of frames: PyTorch, the engine, and what differs."""
    difference = np.abs(reference.astype(np.int16) - engine.astype(np.int16)) * GAIN
    rows: Sequence[tuple[str, Clip]] = (
        ("PyTorch fp32", reference),
        ("engine", engine),
        (f"difference x{GAIN}", np.minimum(difference, 255).astype(np.uint8)),
    )
    frames, height, width = reference.shape[:3]
    scale = max(1, LEGIBLE // width)
    size = (width * scale, height * scale)
    left = 120
    canvas = Image.new("RGB", (left + frames * (size[0] + 2), 3 * (size[1] + 2) + 10), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (name, clip) in enumerate(rows):
        top = row * (size[1] + 2)
        pen.text((6, top + size[1] // 2 - 6), name, fill="black")
        for index, frame in enumerate(clip):
            picture = Image.fromarray(frame).resize(size, Image.Resampling.NEAREST)
            canvas.paste(picture, (left + index * (size[0] + 2), top))
    return canvas


def _power(error: float) -> float:
    """Where an error stands on the scale; what is none or no number stands at an end."""
    if not math.isfinite(error):
        return 1.0
    return math.log10(max(error, 1e-9))
