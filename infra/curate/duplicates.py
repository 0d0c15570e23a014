"""Duplicates: segments that look alike, found across a whole set by an index.

It owns fingerprints (three difference hashes, one embedding) and who stays; it does not know where segments are kept.
Two indexes propose pairs: bands of hash bits, of which near hashes share one, and cells of the embeddings' space.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from infra.curate.cut import Frame, Segment
from infra.curate.recipe import DuplicatesConfig
from infra.curate.scores.embedding import Embedding, Vectors, unit

LOOKS = 3
"""Frames of a fingerprint, evenly spread."""
_BITS = 64 * LOOKS
_BLOCK = 4096
_PROBES = 2
"""Cells that a vector is compared within."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a segment looks like."""

    bits: npt.NDArray[np.uint8]
    """[192] of 0 and 1."""
    vector: Vectors
    """[D], of length 1, or zeros."""

    @classmethod
    def of(cls, segment: Segment, embedding: Embedding) -> "Fingerprint":
        frames = [segment.small[int((part + 0.5) * len(segment.small) / LOOKS)] for part in range(LOOKS)]
        bits = np.concatenate([_difference_hash(frame) for frame in frames])
        return cls(bits, unit(embedding.embed(frames).reshape(1, -1))[0])

    def packed(self) -> tuple[str, str]:
        """As two texts, for a file."""
        return np.packbits(self.bits).tobytes().hex(), self.vector.astype(np.float16).tobytes().hex()

    @classmethod
    def unpacked(cls, bits: str, vector: str) -> "Fingerprint":
        row = np.frombuffer(bytes.fromhex(vector), np.float16).astype(np.float32)
        return cls(np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8)), unit(row[None])[0])


def find_duplicates(
    prints: Mapping[str, Fingerprint], preferred: Sequence[str], config: DuplicatesConfig
) -> dict[str, str]:
    """What is dropped, by key, and which kept segment it looks like; the first of `preferred` stays.

    A segment that is like a dropped one only is kept: likeness is not passed on.
    """
    keys = list(preferred)
    if not keys or not config.enabled:
        return {}
    like: dict[int, set[int]] = defaultdict(set)
    for first, second in {*_near_hashes(keys, prints, config), *_near_vectors(keys, prints, config)}:
        like[max(first, second)].add(min(first, second))
    dropped: dict[str, str] = {}
    for place in sorted(like):
        stays = next((other for other in sorted(like[place]) if keys[other] not in dropped), None)
        if stays is not None:
            dropped[keys[place]] = keys[stays]
    return dropped


def _near_hashes(
    keys: Sequence[str], prints: Mapping[str, Fingerprint], config: DuplicatesConfig
) -> Iterator[tuple[int, int]]:
    """Pairs within `max_bits`: cut into one band more than that, two near hashes agree in at least one band."""
    bits = np.stack([prints[key].bits for key in keys])
    # A picture without structure hashes to all alike bits, and says nothing.
    telling = (bits.sum(axis=1) > _BITS // 16) & (bits.sum(axis=1) < _BITS - _BITS // 16)
    for band in np.array_split(np.arange(_BITS), config.max_bits + 1):
        rows: dict[bytes, list[int]] = defaultdict(list)
        for place in np.flatnonzero(telling):
            rows[bits[place, band].tobytes()].append(int(place))
        for places in rows.values():
            for position, first in enumerate(places[:-1]):
                others = np.array(places[position + 1 :])
                near = (bits[others] != bits[first]).sum(axis=1) <= config.max_bits
                yield from ((first, int(other)) for other in others[near])


def _near_vectors(
    keys: Sequence[str], prints: Mapping[str, Fingerprint], config: DuplicatesConfig
) -> Iterator[tuple[int, int]]:
    """Pairs above `min_cosine` among vectors that share one of their nearest cells; few vectors are one cell."""
    vectors = np.stack([prints[key].vector for key in keys])
    for places in _cells(vectors):
        places = places[vectors[places].any(axis=1)]
        for start in range(0, len(places), _BLOCK):
            block = places[start : start + _BLOCK]
            near = vectors[block] @ vectors[places].T >= config.min_cosine
            for row, column in zip(*np.nonzero(near), strict=True):
                if block[row] < places[column]:
                    yield int(block[row]), int(places[column])


def _cells(vectors: Vectors) -> Iterator[npt.NDArray[np.intp]]:
    """Places by cell: an inverted file over random members as centres, the same for the same set."""
    total = len(vectors)
    if total <= _BLOCK:
        yield np.arange(total)
        return
    count = int(np.sqrt(total))
    centres = vectors[np.random.default_rng(0).choice(total, count, replace=False)]
    nearest = np.concatenate(
        [
            np.argpartition(-(vectors[start : start + _BLOCK] @ centres.T), _PROBES, axis=1)[:, :_PROBES]
            for start in range(0, total, _BLOCK)
        ]
    )
    for cell in range(count):
        yield np.flatnonzero((nearest == cell).any(axis=1))


def _difference_hash(frame: Frame) -> npt.NDArray[np.uint8]:
    """Whether each of 8 by 9 grey cells is brighter than its right neighbour."""
    grey = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    return (grey[:, :-1] > grey[:, 1:] + 1).astype(np.uint8).reshape(-1)
