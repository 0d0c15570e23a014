"""Temporal consistency: whether a segment shows one thing from start to end."""

import numpy as np

from infra.curate.cut import Segment
from infra.curate.scores.embedding import Embedding

_FRAMES = 5


class Consistency:
    """The smallest cosine between embeddings of neighbours among five frames; 1 for a still, low after a missed cut.

    Dissolves and montages that no detector cut are the inconsistent segments that the paper drops.
    """

    name = "consistency"

    def __init__(self, embedding: Embedding) -> None:
        self._embedding = embedding
        self.model = f"cosine of {embedding.model}"

    def score(self, segment: Segment) -> float:
        vectors = self._embedding.embed([segment.small[place] for place in segment.sampled(_FRAMES)])
        plain = np.abs(vectors).max(axis=1) == 0
        cosines = (vectors[:-1] * vectors[1:]).sum(axis=1)
        # A frame of one colour has no direction: it is like another such, and unlike everything else.
        cosines = np.where(plain[:-1] & plain[1:], 1.0, cosines)
        return float(cosines.min()) if len(cosines) else 1.0
