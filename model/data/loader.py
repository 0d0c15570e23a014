"""Loader: an endless, reproducible order of clips, cut in time and space to what a stage trains on.

It owns which clip comes when and which part of it is shown; it knows nothing of files (shards do) or of training. Every
choice is a function of the seed and a place in the global order of samples, so the same samples come whatever the
number of ranks, and a position is all there is to resume.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.config import DataConfig, Task, VideoConfig
from model.data.shards import Sample, ShardSet
from model.tasks import draw_task, frame_stride, source_frames

logger = logging.getLogger(__name__)

_ORDER, _CUT = 0, 1
"""Separate streams of random numbers: one an epoch, one a sample."""


@dataclass(slots=True)
class ClipBatch:
    """Clips of one shape with what conditions them."""

    frames: Tensor
    """float32 [B, T, 3, H, W] in [-1, 1]."""
    captions: list[str]
    micro: Tensor
    """float32 [B, 6]: original height, original width, crop top, crop left, frame stride, number of frames."""
    keys: list[str]


@dataclass(frozen=True, slots=True)
class _Cut:
    """Clip pixels uint8 [T, H, W, 3] and where in the original picture they begin."""

    frames: npt.NDArray[np.uint8]
    top: float
    left: float


@dataclass(eq=False, repr=False)
class ClipLoader:
    """Iterates over batches without end; its state is the number of samples that all ranks have drawn."""

    shards: ShardSet
    _: KW_ONLY
    video: VideoConfig
    data: DataConfig
    micro_batch_size: int
    rank: int
    world_size: int
    seed: int
    task: Task
    mix: Mapping[Task, float] = field(default_factory=dict[Task, float])
    """Tasks that clips are cut for, by weight; empty is `task` alone."""
    temporal_patch_size: int = 1
    """Frames a token covers; the input view of `multiview` fills one."""
    _position: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.seed < 0:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} must be at least 1, seed {self.seed} at least 0"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks (0 to {self.world_size - 1})")
        if self.task == "t2i" and self.video.num_frames != 1:
            raise ValueError(f"task 't2i' draws single frames: num_frames must be 1, not {self.video.num_frames}")
        self._tasks = dict(self.mix) or {self.task: 1.0}
        self._frames: dict[Task, tuple[int, ...]] = {
            task: source_frames(self.video, task, self.temporal_patch_size) for task in self._tasks
        }
        self._pools = _usable(self.shards, self.video, self.data, self._frames)
        weights = np.array([self.data.weights[source] for source in self._pools], dtype=np.float64)
        self._shares = weights / weights.sum()
        self._epoch_size = sum(len(pool) for pool in self._pools.values())
        self._epoch_order = lru_cache(maxsize=2)(self._shuffled)

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        first = self._position + self.rank * self.micro_batch_size
        batch = self._batch(range(first, first + self.micro_batch_size))
        self._position += self.world_size * self.micro_batch_size
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue at a saved position, on any number of ranks."""
        position = state.get("position")
        if not isinstance(position, int) or position < 0 or len(state) != 1:
            raise ValueError(f"loader state {dict(state)} is not {{'position': samples drawn so far}}")
        self._position = position

    def _batch(self, numbers: range) -> ClipBatch:
        shape = (len(numbers), self.video.num_frames, self.video.height, self.video.width, 3)
        pixels = np.empty(shape, dtype=np.uint8)
        micro = np.empty((len(numbers), 6), dtype=np.float32)
        captions: list[str] = []
        keys: list[str] = []
        for row, number in enumerate(numbers):
            sample = self._sample(number)
            task = draw_task(self._tasks, self.seed, number)
            rng = np.random.Generator(np.random.PCG64([self.seed, _CUT, number]))
            cut = _cut(sample, self.video, self._frames[task], rng, from_start=task == "multiview")
            pixels[row] = cut.frames
            micro[row] = (
                sample.original_height,
                sample.original_width,
                cut.top,
                cut.left,
                frame_stride(self.video, task),
                self.video.num_frames,
            )
            captions.append(caption_of(sample, self.video))
            keys.append(sample.key)
        frames = torch.as_tensor(pixels).permute(0, 1, 4, 2, 3).contiguous().to(torch.float32).div_(127.5).sub_(1.0)
        return ClipBatch(frames, captions, torch.as_tensor(micro), keys)

    def _sample(self, number: int) -> Sample:
        epoch, place = divmod(number, self._epoch_size)
        return self.shards.sample(int(self._epoch_order(epoch)[place]))

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        """Positions of an epoch's samples: each source as often as its weight says, itself evenly, all mixed."""
        rng = np.random.default_rng([self.seed, _ORDER, epoch])
        # One random offset for all boundaries: counts add up to the epoch, and on average are exactly the shares.
        bounds = np.floor(np.cumsum([0.0, *self._shares]).round(12) * self._epoch_size + rng.random()).astype(np.int64)
        drawn: list[npt.NDArray[np.int64]] = []
        for pool, count in zip(self._pools.values(), np.diff(bounds), strict=True):
            passes = -(-int(count) // len(pool))
            drawn.append(np.concatenate([pool[:0], *(rng.permutation(pool) for _ in range(passes))])[:count])
        return rng.permutation(np.concatenate(drawn))


def _usable(
    shards: ShardSet, video: VideoConfig, data: DataConfig, frames: Mapping[Task, tuple[int, ...]]
) -> dict[str, npt.NDArray[np.int64]]:
    """Positions of the samples that are long enough for every task, by source, of the sources that are wanted."""
    longest = max(frames, key=lambda task: frames[task][-1])
    needed = frames[longest][-1] + 1
    stride = f"{'keyframe' if longest == 'keyframes' else 'frame'}_stride {frame_stride(video, longest)}"
    pools: dict[str, npt.NDArray[np.int64]] = {}
    for source in sorted(data.weights):
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


def caption_of(sample: Sample, video: VideoConfig) -> str:
    """The caption of the clip, or of any single frame of it where the stage trains on images."""
    still = sample.extra.get("image_caption") if video.num_frames == 1 else None
    return still if isinstance(still, str) else sample.caption


def middle_cut(sample: Sample, video: VideoConfig, places: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Frames [T, H, W, 3] at `places`, the largest middle part of the wanted aspect: without chance, to measure on."""
    height, width, scale = _window(sample, video)
    top, left = (sample.frames.shape[1] - height) // 2, (sample.frames.shape[2] - width) // 2
    return _fitted(sample.frames[list(places), top : top + height, left : left + width], video, scale)


def _cut(
    sample: Sample, video: VideoConfig, places: tuple[int, ...], rng: np.random.Generator, *, from_start: bool
) -> _Cut:
    """Frames at `places` of a random window in time, or of the first one; in space the largest of the wanted aspect.

    No flip: captions name directions.
    """
    length, stored_height, stored_width = cast(tuple[int, int, int], sample.frames.shape[:3])
    start = 0 if from_start else int(rng.integers(length - places[-1]))
    frames = sample.frames[[start + place for place in places]]
    height, width, scale = _window(sample, video)
    top = int(rng.integers(stored_height - height + 1))
    left = int(rng.integers(stored_width - width + 1))
    return _Cut(
        frames=_fitted(frames[:, top : top + height, left : left + width], video, scale),
        top=top * sample.original_height / stored_height,
        left=left * sample.original_width / stored_width,
    )


def _window(sample: Sample, video: VideoConfig) -> tuple[int, int, float]:
    """Height and width of the largest part of the wanted aspect, and the scale that makes it the wanted size."""
    stored_height, stored_width = cast(tuple[int, int], sample.frames.shape[1:3])
    scale = max(video.height / stored_height, video.width / stored_width)
    return min(stored_height, round(video.height / scale)), min(stored_width, round(video.width / scale)), scale


def _fitted(frames: npt.NDArray[np.uint8], video: VideoConfig, scale: float) -> npt.NDArray[np.uint8]:
    if frames.shape[1:3] == (video.height, video.width):
        return frames
    return _resized(frames, video, shrink=scale < 1)


def _resized(frames: npt.NDArray[np.uint8], video: VideoConfig, *, shrink: bool) -> npt.NDArray[np.uint8]:
    # Averaging over the area keeps fine detail from flickering when it shrinks; it cannot enlarge smoothly.
    interpolation = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    resized = np.empty((len(frames), video.height, video.width, 3), dtype=np.uint8)
    for index in range(len(frames)):
        resized[index] = cv2.resize(frames[index], (video.width, video.height), interpolation=interpolation)
    return resized
