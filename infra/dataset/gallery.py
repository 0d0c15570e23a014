"""A gallery of a shard set: one HTML file with clips that play, captions and facts.

It owns the page; it does not know who made the set.
"""

import base64
from pathlib import Path

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape

from model.data.shards import ShardSet

_TEMPLATES = Path(__file__).parent / "templates"
_FILM = 5
"""Frames shown of a clip that is not stored as a video."""


def write_gallery(folder: Path, out: Path, count: int) -> int:
    """Put up to `count` samples, evenly spread, into the page, and return how many; latents have no pictures."""
    shards = ShardSet(folder)
    if shards.index.latents is not None:
        raise ValueError(f"{folder} holds latents, which cannot be looked at; view the set that they were encoded from")
    shown = sorted({int(place) for place in np.linspace(0, len(shards) - 1, min(count, len(shards)))})
    clips: list[dict[str, object]] = []
    for position in shown:
        entry = shards.entries[position]
        facts, clip = shards.stored(position)
        if entry.encoding == "mp4":
            video, pictures = "data:video/mp4;base64," + base64.b64encode(clip).decode(), []
        else:
            video, pictures = "", [_jpeg(frame) for frame in _spread(shards, position)]
        clips.append({"entry": entry, "facts": facts, "video": video, "pictures": pictures})
    jinja = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=select_autoescape(("html.j2",)))
    out.write_text(jinja.get_template("gallery.html.j2").render(folder=folder, clips=clips, total=len(shards)))
    return len(clips)


def _spread(shards: ShardSet, position: int) -> np.ndarray:
    places = np.linspace(0, shards.entries[position].num_frames - 1, _FILM).astype(int)
    return shards.sample(position, [int(place) for place in places]).frames


def _jpeg(frame: np.ndarray) -> str:
    data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))[1].tobytes()
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
