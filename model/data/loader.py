"""Loader: an endless, reproducible order of clips, cut in time and space to what a stage trains on.

It owns what each rank takes of each step, what has been consumed, and how much corruption is borne; `order` says which
clip comes when, `batch` makes batches of them, here or in other processes. Every choice is a function of the seed and
a place in the global order of samples, so the same samples come whatever the number of ranks or processes.
"""

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import cast

from model.config import BucketConfig, DataConfig, Task, VideoConfig
from model.data.batch import BatchMaker, ClipBatch, ClipRequest, check_corrupt
from model.data.order import ClipOrder, bucket_shape, draw_shape, own_shape
from model.data.prefetch import prefetched
from model.data.shards import ShardSet
from monitoring.metrics import TRAINING_CORRUPT_SAMPLES_TOTAL

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class ClipLoader:
    """Iterates over micro-batches without end.

    A step is `accumulation` micro-batches on each of `world_size` ranks, all of one shape. Its state, between steps, is
    `{"step": steps done, "drawn": clips drawn of each shape by all ranks}`: what was consumed, not what was made ahead.
    It goes on from there on any number of ranks whose steps hold as many clips, without leaving out or repeating one.
    """

    shards: ShardSet
    _: KW_ONLY
    video: VideoConfig
    data: DataConfig
    micro_batch_size: int
    """Clips of `video` in a micro-batch; of a bucket, as many as have no more tokens."""
    rank: int
    world_size: int
    """Ranks, or groups of ranks, that take clips of their own."""
    seed: int
    task: Task
    mix: Mapping[Task, float] = field(default_factory=dict[Task, float])
    """Tasks that clips are cut for, by weight; empty is `task` alone."""
    temporal_patch_size: int = 1
    """Frames a token covers; the input view of `multiview`, and an image, fill one."""
    buckets: tuple[BucketConfig, ...] = ()
    """Shapes that steps are drawn from; empty is `video` alone."""
    accumulation: int = 1
    """Micro-batches that a rank takes in a step."""
    workers: int = 0
    """Processes that make batches ahead; 0 makes them in this one."""

    def __post_init__(self) -> None:
        self._check()
        own = own_shape(self.video, dict(self.mix) or {self.task: 1.0}, self.temporal_patch_size, self.micro_batch_size)
        self._shapes = [bucket_shape(own, bucket, self.temporal_patch_size) for bucket in self.buckets] or [own]
        self._orders = [
            ClipOrder(self.shards, shape, self.data, (self.seed, *([place] if self.buckets else [])))
            for place, shape in enumerate(self._shapes)
        ]
        self._make = BatchMaker(self.shards, self._shapes, self.seed, self.data.max_corrupt)
        self._step, self._turn = 0, 0
        self._drawn = [0] * len(self._shapes)
        self._corrupt: dict[str, str] = {}
        self._batches: Iterator[ClipBatch] | None = None

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        if self._batches is None:
            requests = self._requests(self._step, self._turn, list(self._drawn))
            self._batches = (
                prefetched(self._make, requests, self.workers) if self.workers else map(self._make, requests)
            )
        batch = next(self._batches)
        self._note_corrupt(batch)
        self._turn += 1
        if self._turn == self.accumulation:
            shape = self._shape_of(self._step)
            self._drawn[shape] += self._rows(shape)
            self._step, self._turn = self._step + 1, 0
        return batch

    def state_dict(self) -> dict[str, object]:
        if self._turn:
            raise ValueError(
                f"{self._turn} of {self.accumulation} micro-batches of a step are drawn: save between steps"
            )
        return {"step": self._step, "drawn": list(self._drawn)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue at a saved place, on any number of ranks."""
        step, drawn = state.get("step"), state.get("drawn")
        numbers = [step, *(cast(list[object], drawn) if isinstance(drawn, list) else [])]
        sound = all(isinstance(number, int) and number >= 0 for number in numbers) and len(state) == 2
        if not sound or len(numbers) != 1 + len(self._shapes):
            raise ValueError(
                f"loader state {dict(state)} is not {{'step': steps done, 'drawn': clips of each of {len(self._shapes)}"
                " shapes}; go on with the recipe and version of the project that saved it"
            )
        self.close()
        self._step, *self._drawn = cast(list[int], numbers)
        self._turn = 0

    def close(self) -> None:
        """End the processes that make batches; the next batch starts new ones."""
        if self._batches is not None and self.workers:
            cast(Generator[ClipBatch, None, None], self._batches).close()
        self._batches = None

    def _requests(self, step: int, turn: int, drawn: list[int]) -> Iterator[ClipRequest]:
        """What this rank takes from micro-batch `turn` of `step` on, where `drawn` clips of each shape came before."""
        while True:
            shape = self._shape_of(step)
            rows, order = self._shapes[shape].rows, self._orders[shape]
            for micro_batch in range(turn, self.accumulation):
                first = (micro_batch * self.world_size + self.rank) * rows
                places = range(drawn[shape] + first, drawn[shape] + first + rows)
                begin = sum(drawn) + first
                yield ClipRequest(shape, range(begin, begin + rows), tuple(order[place] for place in places))
            drawn[shape] += self._rows(shape)
            step, turn = step + 1, 0

    def _shape_of(self, step: int) -> int:
        return draw_shape(self._shapes, self.seed, step)

    def _rows(self, shape: int) -> int:
        """Clips of a step, of all ranks."""
        return self._shapes[shape].rows * self.accumulation * self.world_size

    def _note_corrupt(self, batch: ClipBatch) -> None:
        """The same sample comes again every epoch; it counts once."""
        for key, reason in batch.corrupt.items():
            if key not in self._corrupt:
                self._corrupt[key] = reason
                TRAINING_CORRUPT_SAMPLES_TOTAL.inc()
                logger.warning("left out: %s (%s of at most %s)", reason, len(self._corrupt), self.data.max_corrupt)
        check_corrupt(self._corrupt, self.data.max_corrupt)

    def _check(self) -> None:
        if self.micro_batch_size < 1 or self.seed < 0:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} must be at least 1, seed {self.seed} at least 0"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks (0 to {self.world_size - 1})")
        if self.task == "t2i" and self.video.num_frames != 1:
            raise ValueError(f"task 't2i' draws single frames: num_frames must be 1, not {self.video.num_frames}")
