"""The scorers of a recipe, and the facts that need none: size, length, orientation."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from infra.curate.cut import Segment
from infra.curate.recipe import ScoresConfig
from infra.curate.scores.aesthetic import AestheticNetwork, Colourfulness
from infra.curate.scores.clarity import Laplacian
from infra.curate.scores.consistency import Consistency
from infra.curate.scores.embedding import Embedding, NetworkEmbedding, Thumbnail
from infra.curate.scores.motion import DisFlow
from infra.curate.scores.text import DbText, MserText

FACTS = ("width", "height", "short_side", "aspect", "orientation", "seconds", "fps", "brightness")
SCORES = ("motion", "clarity", "text_area", "aesthetic", "consistency")


class Scorer(Protocol):
    """One number of a segment; `name` is what filters call it, `model` what the card says it is from."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str: ...

    def score(self, segment: Segment) -> float: ...


def make_embedding(config: ScoresConfig) -> Embedding:
    return NetworkEmbedding(config.embedding_network) if config.embedding_network else Thumbnail()


def make_scorers(config: ScoresConfig, embedding: Embedding) -> Sequence[Scorer]:
    """In the order in which they are computed; ValueError for a network's file that is not there."""
    return (
        DisFlow(),
        Laplacian(),
        DbText(config.text_network) if config.text_network else MserText(),
        AestheticNetwork(config.aesthetic_network) if config.aesthetic_network else Colourfulness(),
        Consistency(embedding),
    )


def facts_of(segment: Segment) -> dict[str, float | int | str]:
    """Width and height are pixels of the original that remain within its borders."""
    top, bottom, left, right = segment.borders
    height = round(segment.picture.height * (1 - top - bottom))
    width = round(segment.picture.width * (1 - left - right))
    middle = segment.small[len(segment.small) // 2]
    return {
        "width": width,
        "height": height,
        "short_side": min(width, height),
        "aspect": round(width / height, 4),
        "orientation": "landscape" if width > height else "portrait" if height > width else "square",
        "seconds": round(len(segment.frames) / segment.fps, 4),
        "fps": round(segment.fps, 4),
        "brightness": round(float(np.mean(middle)), 2),
    }
