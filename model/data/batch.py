"""Batches: the clips of one micro-batch, read and cut, each a function of the seed and its number alone.

It owns what a batch holds and what stands in for a corrupt sample; it knows nothing of which clips were chosen or in
which process it runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.config import BucketConfig, Task
from model.data.cut import Cut, caption_of, random_cut
from model.data.order import ClipShape
from model.data.shards import LatentSample, Sample, SampleCorrupt, ShardSet
from model.tasks import draw_task, frame_stride
from model.vae import FrameCodec

_CUT = 1
"""Stream of random numbers, one a clip."""


@dataclass(slots=True)
class ClipBatch:
    """Clips of one shape with what conditions them."""

    clips: Tensor
    """Pixels uint8 [B, T, H, W, 3], or what a set of latents holds, float [B, T, C, h, w]."""
    captions: list[str]
    micro: Tensor
    """float32 [B, 6]: original height, original width, crop top, crop left, frame stride, number of frames."""
    keys: list[str]
    numbers: list[int]
    """Each clip's place in the global order of the run, which no other clip has; all that is drawn for it uses it."""
    bucket: BucketConfig | None = None
    """The shape, where it is not the stage's own."""
    corrupt: dict[str, str] = field(default_factory=dict[str, str])
    """Key and reason of every sample that another one stands in for."""

    @property
    def frames(self) -> Tensor:
        """Pixels as float32 [B, T, 3, H, W] in [-1, 1], made anew where they are."""
        return (self.clips.permute(0, 1, 4, 2, 3).contiguous() / 127.5).sub_(1.0)

    def latents(self, codec: FrameCodec) -> Tensor:
        """float32 [B, T, C, h, w]: the stored ones, or the pixels encoded now."""
        return self.clips.float() if self.clips.is_floating_point() else codec.encode(self.frames)

    def to(self, device: torch.device) -> Self:
        """On `device`; the copy does not wait where the batch is in pinned memory."""
        clips, micro = (tensor.to(device, non_blocking=True) for tensor in (self.clips, self.micro))
        return replace(self, clips=clips, micro=micro)

    def pin_memory(self) -> Self:
        """In memory that a GPU copies from by itself; torch's DataLoader calls it."""
        return replace(self, clips=self.clips.pin_memory(), micro=self.micro.pin_memory())


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """Clips that make a batch."""

    shape: int
    numbers: range
    positions: tuple[int, ...]
    """Where each lies in the shard set."""


@dataclass(frozen=True, slots=True)
class BatchMaker:
    """Makes batches; picklable, so that it can work in another process."""

    shards: ShardSet
    shapes: Sequence[ClipShape]
    seed: int
    max_corrupt: int

    def __call__(self, request: ClipRequest) -> ClipBatch:
        shape = self.shapes[request.shape]
        video = shape.video
        clips: list[npt.NDArray[Any]] = []
        micro = np.empty((len(request.numbers), 6), dtype=np.float32)
        captions: list[str] = []
        keys: list[str] = []
        corrupt: dict[str, str] = {}
        for row, (number, position) in enumerate(zip(request.numbers, request.positions, strict=True)):
            task = draw_task(shape.tasks, self.seed, number)
            sample, cut = self._read(shape, task, number, position, corrupt)
            clips.append(cut.clip)
            micro[row] = (
                sample.original_height,
                sample.original_width,
                cut.top,
                cut.left,
                frame_stride(video, task),
                1 if shape.still else video.num_frames,
            )
            captions.append(caption_of(sample, still=shape.still))
            keys.append(sample.key)
        return ClipBatch(
            torch.from_numpy(np.stack(clips)),  # pyright: ignore[reportUnknownMemberType]
            captions,
            torch.from_numpy(micro),  # pyright: ignore[reportUnknownMemberType]
            keys,
            list(request.numbers),
            shape.bucket,
            corrupt,
        )

    def _read(
        self, shape: ClipShape, task: Task, number: int, position: int, corrupt: dict[str, str]
    ) -> tuple[Sample | LatentSample, Cut]:
        """The clip's frames at a random place in time and, where they are pixels, in space.

        In place of a corrupt sample comes the next of its source that fits: of the seed, the place and the set alone,
        so every run over this set sees the same one there.
        """
        for entry_at in self._candidates(shape, position):
            entry = self.shards.entries[entry_at]
            rng = np.random.Generator(np.random.PCG64([self.seed, _CUT, number]))
            places = shape.places[task]
            start = 0 if task == "multiview" else int(rng.integers(entry.num_frames - places[-1]))
            wanted = [start + place for place in places]
            try:
                if self.shards.index.latents is not None:
                    encoded = self.shards.latents(entry_at, wanted)
                    return encoded, Cut(encoded.latents, encoded.top, encoded.left)
                sample = self.shards.sample(entry_at, wanted)
            except SampleCorrupt as error:
                corrupt[entry.key] = str(error)
                check_corrupt(corrupt, self.max_corrupt)
            else:
                return sample, random_cut(sample, shape.video, rng)
        raise SampleCorrupt(f"no sample of source '{self.shards.entries[position].source}' can be read")

    def _candidates(self, shape: ClipShape, position: int) -> Iterator[int]:
        entries = self.shards.entries
        yield position
        source = entries[position].source
        for step in range(1, len(entries)):
            at = (position + step) % len(entries)
            if entries[at].source == source and shape.fits(entries[at]):
                yield at


def check_corrupt(corrupt: dict[str, str], most: int) -> None:
    """`SampleCorrupt` where more samples are corrupt than may be."""
    if len(corrupt) > most:
        *_, last = corrupt.values()
        raise SampleCorrupt(f"{last}; corrupt so far: {len(corrupt)}, data.max_corrupt allows {most} and can be raised")
