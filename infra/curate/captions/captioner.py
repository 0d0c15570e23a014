"""Captioners: a sentence or three that say what a segment shows.

It owns who captions and with which words an endpoint is asked; it knows nothing of when, or of where answers are kept.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from infra.curate.captions.endpoint import Endpoint
from infra.curate.staging import Row

PROMPTS = Path(__file__).parent / "prompts"
_COLOURS = {
    "red": (180, 50, 50),
    "orange": (210, 130, 50),
    "yellow": (210, 200, 80),
    "green": (70, 140, 70),
    "blue": (60, 90, 170),
    "purple": (120, 70, 140),
    "pink": (220, 150, 170),
    "brown": (110, 80, 55),
}
_GREY = 18
"""Spread of the channels under which a colour is a grey."""


class Captioner(Protocol):
    """Whoever says what is seen; `name` changes when its answers may."""

    @property
    def name(self) -> str: ...

    def caption(self, row: Row, looks: Sequence[bytes]) -> str:
        """The caption of a segment, of which `looks` are JPEGs in order."""
        ...


class OfflineCaptioner:
    """The words that came with the video or, where there are none, what can be measured. Asks nobody; deterministic."""

    name = "offline"

    def caption(self, row: Row, looks: Sequence[bytes]) -> str:
        return row.about.caption or described(row)


class VisionCaptioner:
    """A vision model behind an endpoint, shown `frames` pictures spread over the segment."""

    def __init__(self, endpoint: Endpoint, frames: int, prompt: Path | None = None) -> None:
        self._endpoint = endpoint
        self._frames = frames
        self._prompt = prompt_text("caption", prompt)
        marks = hashlib.sha256(f"{self._prompt}{frames}".encode()).hexdigest()[:12]
        self.name = f"{endpoint.config.model}@{marks}"

    def caption(self, row: Row, looks: Sequence[bytes]) -> str:
        shown = spread(looks, self._frames)
        return " ".join(self._endpoint.ask(self._prompt.format(frames=len(shown)), shown).split())


def prompt_text(name: str, path: Path | None = None) -> str:
    """The built-in prompt of that name, or a file's; ValueError where there is none."""
    try:
        return (path or PROMPTS / f"{name}.txt").read_text().strip()
    except OSError as error:
        raise ValueError(f"prompt {path}: {error.strerror}; give a text file") from None


def spread(looks: Sequence[bytes], count: int) -> list[bytes]:
    """`count` of them, the middles of equal parts."""
    count = min(count, len(looks))
    return [looks[int((part + 0.5) * len(looks) / count)] for part in range(count)]


def category_of(endpoint: Endpoint, caption: str, categories: Sequence[str]) -> str:
    """The category that a language model names, or `other` where it names none of them."""
    told = endpoint.ask(prompt_text("category").format(caption=caption, categories=", ".join(categories)))
    return next((name for name in categories if name.casefold() == told.strip(" .\"'").casefold()), "other")


def keeps_original(key: str, share: float) -> bool:
    """Whether this segment is among the `share` that keep the caption they came with; the same in every run."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 < share


def described(row: Row) -> str:
    """Colour, light, shape and motion in words."""
    blue, green, red = bytes.fromhex(row.colour)
    light, motion = float(row.facts["brightness"]), float(row.facts["motion"])
    shade = "dark" if light < 70 else "bright" if light > 170 else "evenly lit"
    article = "an" if shade[0] in "aeiou" else "a"
    pace = "almost no motion" if motion < 0.5 else "slow motion" if motion < 8 else "fast motion"
    tones = f"mostly {_colour_name(red, green, blue)} tones"
    return f"{article} {shade} {row.facts['orientation']} picture in {tones} with {pace}"


def _colour_name(red: int, green: int, blue: int) -> str:
    if max(red, green, blue) - min(red, green, blue) < _GREY:
        level = (red + green + blue) / 3
        return "black" if level < 50 else "white" if level > 205 else "grey"

    def distance(name: str) -> float:
        return sum((one - other) ** 2 for one, other in zip((red, green, blue), _COLOURS[name], strict=True))

    return min(_COLOURS, key=distance)
