"""The order of clips: which shape a step trains on, and which clip of the set comes at which place of its order.

It owns every such choice; each is a function of the seed and a place alone. It knows nothing of pixels, ranks or files.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from model.config import BucketConfig, DataConfig, Task, VideoConfig
from model.data.shards import SampleEntry, ShardSet
from model.tasks import frame_stride, source_frames

logger = logging.getLogger(__name__)

_ORDER = 0
"""Stream of random numbers, one an epoch."""


@dataclass(frozen=True, slots=True)
class ClipShape:
    """What a step trains on."""

    bucket: BucketConfig | None
    """None is the stage's own shape."""
    video: VideoConfig
    """With frames as batches hold them: an image is repeated until it fills a token."""
    tasks: Mapping[Task, float]
    """Tasks that clips are cut for, by weight."""
    places: Mapping[Task, tuple[int, ...]]
    """Where each frame of a clip stands in its source, counted from the clip's first frame."""
    still: bool
    """Single frames: captions are a still's."""
    rows: int
    """Clips in a micro-batch."""

    @property
    def longest(self) -> Task:
        """The task that needs most of a source."""
        return max(self.places, key=lambda task: self.places[task][-1])

    @property
    def needed(self) -> int:
        """Frames that a source must have."""
        return self.places[self.longest][-1] + 1

    def fits(self, entry: SampleEntry) -> bool:
        return entry.num_frames >= self.needed


def own_shape(video: VideoConfig, tasks: Mapping[Task, float], temporal_patch_size: int, rows: int) -> ClipShape:
    """The stage's own."""
    places: dict[Task, tuple[int, ...]] = {task: source_frames(video, task, temporal_patch_size) for task in tasks}
    return ClipShape(None, video, tasks, places, video.num_frames == 1, rows)


def bucket_shape(own: ClipShape, bucket: BucketConfig, temporal_patch_size: int) -> ClipShape:
    """A bucket's: as many rows as fit into the tokens of the own shape's micro-batch; ValueError where none does."""
    still = bucket.num_frames == 1
    frames = temporal_patch_size if still else bucket.num_frames
    size = {"num_frames": frames, "height": bucket.height, "width": bucket.width}
    video = own.video.model_copy(update=size)
    # A token covers equally many pixels in every shape, so pixels compare as tokens do.
    rows = own.rows * _pixels(own.video) // _pixels(video)
    if rows < 1:
        raise ValueError(f"one clip of bucket {bucket} has more tokens than a micro-batch of {own.rows} clips")
    if still:
        return ClipShape(bucket, video, {"t2i": 1.0}, {"t2i": (0,) * frames}, still, rows)
    shape = own_shape(video, own.tasks, temporal_patch_size, rows)
    return replace(shape, bucket=bucket)


def draw_shape(shapes: Sequence[ClipShape], seed: int, step: int) -> int:
    """Which of `shapes` all ranks train on in `step`."""
    if len(shapes) == 1:
        return 0
    weights = [shape.bucket.weight if shape.bucket else 1.0 for shape in shapes]
    digest = hashlib.blake2b(f"{seed}:shape:{step}".encode(), digest_size=8).digest()
    drawn = int.from_bytes(digest) / 2**64 * sum(weights)
    return min(int(np.searchsorted(np.cumsum(weights), drawn, side="right")), len(shapes) - 1)


class ClipOrder:
    """An endless order of the clips that fit a shape: epochs, each source as often in them as its weight says."""

    def __init__(self, shards: ShardSet, shape: ClipShape, data: DataConfig, seed: tuple[int, ...]) -> None:
        self._pools = _usable(shards, shape, data.weights)
        weights = np.array([data.weights[source] for source in self._pools], dtype=np.float64)
        self._shares = weights / weights.sum()
        self._epoch_size = sum(len(pool) for pool in self._pools.values())
        self._window = data.shuffle_shards
        self._shard_of = np.array([entry.shard for entry in shards.entries]) if self._window else None
        self._seed, *self._stream = seed
        self._epoch_order = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, place: int) -> int:
        """Position in the set of the clip at `place` of the order."""
        epoch, within = divmod(place, self._epoch_size)
        return int(self._epoch_order(epoch)[within])

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        """Positions of an epoch's samples: each source as often as its weight says, itself evenly, all mixed."""
        rng = np.random.default_rng([self._seed, _ORDER, epoch, *self._stream])
        # One random offset for all boundaries: counts add up to the epoch, and on average are exactly the shares.
        bounds = np.floor(np.cumsum([0.0, *self._shares]).round(12) * self._epoch_size + rng.random()).astype(np.int64)
        drawn: list[npt.NDArray[np.int64]] = []
        for pool, count in zip(self._pools.values(), np.diff(bounds), strict=True):
            passes = -(-int(count) // len(pool))
            drawn.append(np.concatenate([pool[:0], *(rng.permutation(pool) for _ in range(passes))])[:count])
        order = rng.permutation(np.concatenate(drawn))
        if self._shard_of is None:
            return order
        shards = self._shard_of[order]
        turn = rng.permutation(int(self._shard_of.max()) + 1)[shards] // self._window
        return order[np.argsort(turn, kind="stable")]


def _pixels(video: VideoConfig) -> int:
    return video.num_frames * video.height * video.width


def _usable(shards: ShardSet, shape: ClipShape, weights: Mapping[str, float]) -> dict[str, npt.NDArray[np.int64]]:
    """Positions of the samples that are long enough for every task, by source, of the sources that are wanted."""
    video, longest, needed = shape.video, shape.longest, shape.needed
    stride = f"{'keyframe' if longest == 'keyframes' else 'frame'}_stride {frame_stride(video, longest)}"
    pools: dict[str, npt.NDArray[np.int64]] = {}
    for source in sorted(weights):
        if source not in shards.sources:
            raise ValueError(f"data.weights names source '{source}'; {shards.folder} holds {sorted(shards.sources)}")
        lengths = {at: entry.num_frames for at, entry in enumerate(shards.entries) if entry.source == source}
        pools[source] = np.array([at for at, length in lengths.items() if length >= needed], dtype=np.int64)
        excluded = len(lengths) - len(pools[source])
        if excluded == len(lengths):
            raise ValueError(
                f"no clip of source '{source}' in {shards.folder} is long enough: num_frames {video.num_frames} at"
                f" {stride} needs {needed} frames, the longest of {len(lengths)} clips has"
                f" {max(lengths.values())}; lower one of them or take the source out of data.weights"
            )
        if excluded:
            logger.info("excluded %s of %s clips of %s: under %s frames", excluded, len(lengths), source, needed)
    return pools
