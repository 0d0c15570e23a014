"""Statistics of a shard set: how much of what it holds.

It owns which figures there are; it does not know who made the set.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.data.shards import SampleCorrupt, ShardCorrupt, ShardSet

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a set holds."""

    samples: int
    frames: int
    seconds: float
    size: int
    """Bytes."""
    sources: dict[str, int]
    licences: dict[str, int]
    encodings: dict[str, int]
    sizes: dict[str, int]
    """Samples by the original's height and width, the most frequent twenty."""
    quantiles: dict[str, tuple[float, ...]]
    """Of frames, seconds, caption words and each score, at `QUANTILES`."""


def statistics_of(folder: Path) -> Statistics:
    """Reads every sample's facts, and no frame."""
    shards = ShardSet(folder)
    facts = [shards.stored(position)[0] for position in range(len(shards))]
    entries = shards.entries
    seconds = [entry.num_frames / _number(told["fps"]) for entry, told in zip(entries, facts, strict=True)]
    values: dict[str, list[float]] = {
        "frames": [float(entry.num_frames) for entry in entries],
        "seconds": seconds,
        "caption_words": [float(len(entry.caption.split())) for entry in entries],
    }
    for told in facts:
        scores = told.get("scores")
        for name, value in scores.items() if isinstance(scores, dict) else ():
            if isinstance(value, int | float) and name != "seconds":
                values.setdefault(name, []).append(float(value))
    return Statistics(
        samples=len(entries),
        frames=sum(entry.num_frames for entry in entries),
        seconds=sum(seconds),
        size=sum(shard.size for shard in shards.index.shards),
        sources={name: totals.samples for name, totals in shards.sources.items()},
        licences=dict(Counter(str(told["licence"]) for told in facts).most_common()),
        encodings=dict(Counter(entry.encoding for entry in entries)),
        sizes=dict(Counter(f"{told['original_height']}x{told['original_width']}" for told in facts).most_common(20)),
        quantiles={
            name: tuple(float(value) for value in np.quantile(found, QUANTILES)) for name, found in values.items()
        },
    )


def verify(folder: Path) -> list[str]:
    """What is wrong with a set, a sentence each: shards by digest, samples by checksum, every clip decoded."""
    shards = ShardSet(folder)
    problems: list[str] = []
    for shard in shards.index.shards:
        with (folder / shard.name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            problems.append(str(ShardCorrupt(folder / shard.name, expected=shard.sha256, found=found)))
    for position in range(len(shards)):
        try:
            if shards.index.latents is None:
                shards.sample(position)
            else:
                shards.latents(position, (0,))
        except SampleCorrupt as error:
            problems.append(str(error))
    return problems


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
