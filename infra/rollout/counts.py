"""What happened on each track between two looks: exact counts, read off Prometheus' counters.

It owns the queries and the differences; it knows nothing of verdicts. `increase()` extrapolates to numbers that were
never counted, and a test of counts wants whole ones; so the raw values are read, and restarts of a counter seen here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from infra.rollout.prometheus import Prometheus, Sample
from infra.serving.jobs.table import Track

TRACKS: tuple[Track, Track] = ("stable", "canary")
BAD_OUTCOMES = frozenset({"failed", "handed_over"})
OUTCOMES = "stiv_jobs_total"
LATENCY = "stiv_job_run_seconds_bucket"
FRAMES = "stiv_frames_total"
BLANK = "stiv_blank_frames_total"
MEMORY = "stiv_memory_bytes"
COUNTERS = (OUTCOMES, LATENCY, FRAMES, BLANK)

Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(slots=True)
class Batch:
    """One track's events between two looks."""

    completed: int = 0
    bad: int = 0
    """Jobs that failed, or were handed over."""
    frames: int = 0
    blank: int = 0
    within: dict[str, dict[float, int]] = field(default_factory=lambda: {})
    """Class of work -> upper edge in seconds -> videos that took at most so long; `inf` has all."""

    @property
    def ended(self) -> int:
        return self.completed + self.bad


@dataclass(slots=True, frozen=True)
class Look:
    """What a question to Prometheus gave."""

    batches: Mapping[Track, Batch]
    up: Mapping[Track, bool]
    """Whether the last scrape of any of its servers succeeded; a track that Prometheus does not know is down."""
    memory_bytes: Mapping[Track, float]
    """The most of one server; a track that says nothing is missing."""


class Counts:
    """Batches of both tracks, each since the last look. The first look only says where the counters stand."""

    def __init__(self, prometheus: Prometheus) -> None:
        self.prometheus = prometheus
        self._standing: dict[Series, float] = {}

    def look(self) -> Look:
        """Raises `PrometheusUnreachable`; the events since the last look are then in the next one."""
        names, tracks = "|".join((*COUNTERS, MEMORY, "up")), "|".join(TRACKS)
        samples = self.prometheus.query(f'{{__name__=~"{names}",track=~"{tracks}"}}')
        batches: dict[Track, Batch] = {track: Batch() for track in TRACKS}
        for sample in samples:
            if sample.labels["__name__"] in COUNTERS:
                _add(batches[_track(sample)], sample.labels, self._risen(sample))
        return Look(batches, up=_up(samples), memory_bytes=_memory(samples))

    def _risen(self, sample: Sample) -> int:
        """Since the last look; a series that is new began at 0, and so did one that fell."""
        series = sample.labels["__name__"], tuple(sorted(sample.labels.items()))
        before = self._standing.get(series, 0.0)
        self._standing[series] = sample.value
        return round(sample.value if sample.value < before else sample.value - before)


def _add(batch: Batch, labels: Mapping[str, str], count: int) -> None:
    match labels["__name__"]:
        case "stiv_jobs_total" if labels["outcome"] in BAD_OUTCOMES:
            batch.bad += count
        case "stiv_jobs_total" if labels["outcome"] == "completed":
            batch.completed += count
        case "stiv_frames_total":
            batch.frames += count
        case "stiv_blank_frames_total":
            batch.blank += count
        case "stiv_job_run_seconds_bucket":
            edges = batch.within.setdefault(labels["work"], {})
            edge = float(labels["le"])
            edges[edge] = edges.get(edge, 0) + count
        case _:
            pass


def _track(sample: Sample) -> Track:
    return "canary" if sample.labels["track"] == "canary" else "stable"


def _up(samples: Iterable[Sample]) -> dict[Track, bool]:
    up = dict.fromkeys(TRACKS, False)
    for sample in samples:
        if sample.labels["__name__"] == "up":
            up[_track(sample)] |= sample.value == 1
    return up


def _memory(samples: Iterable[Sample]) -> dict[Track, float]:
    """Of the GPU where there is one."""
    found: dict[Track, dict[str, float]] = {track: {} for track in TRACKS}
    for sample in samples:
        if sample.labels["__name__"] == MEMORY:
            places = found[_track(sample)]
            places[sample.labels["where"]] = max(sample.value, places.get(sample.labels["where"], 0.0))
    return {track: places.get("gpu", places.get("host", 0.0)) for track, places in found.items() if places}
