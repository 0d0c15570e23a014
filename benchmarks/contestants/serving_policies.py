"""How two servers of video diffusion choose who is denoised together, on our worker in place of our scheduler.

It owns the two rules, as their sources have them, and where they are given more than they have there:

- `EqualKeys`: vLLM-Omni 0.30 (`diffusion/sched/step_scheduler.py`). First in, first out; a request joins at any
  denoise step if its key equals that of the running ones (shape, rate, guidance and its scales; steps may differ), and
  the first that does not holds up all behind it. Here a given image is no part of the key.
- `RequestBatches`: SGLang 0.5 diffusion (`multimodal_gen/runtime/managers/scheduler.py`). The oldest request and those
  of the queue that equal it in everything but prompt and seed are made together from start to end; requests with an
  image are made alone. No delay, its default.

Both are told of a running video's last step before it, so that texts of the next are encoded meanwhile, and decoding
is beside the engine: our worker does so, theirs do not. Both may fill a call up to our engine rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from infra.serving.limits import VideoRequest
from infra.serving.scheduling.cost import CostModel
from infra.serving.scheduling.order import Video
from infra.serving.scheduling.scheduler import Row, Scheduler

Requests = Callable[[Iterable[str]], Mapping[str, tuple[VideoRequest, bool]]]
"""Of job ids: what was asked, and whether an image was given."""


class _FirstInFirstOut(Scheduler[Row]):
    """What is resident runs until it is done."""

    def __init__(self, max_rows: int, requests: Requests, **settings: Any) -> None:
        super().__init__(max_rows, CostModel(), **settings)
        self._requests = requests
        self._known: dict[str, tuple[VideoRequest, bool]] = {}

    def choose(self, waiting: Sequence[Video], limit: int) -> list[str]:
        for job in waiting:
            self._coming.pop(job.job_id, None)
        unknown = [job.job_id for job in waiting if job.job_id not in self._known]
        self._known |= self._requests(unknown) if unknown else {}
        chosen = self._next(sorted(waiting, key=lambda job: job.created_at))[:limit]
        self._coming |= {job.job_id: self._priced(job) for job in chosen}
        return [job.job_id for job in chosen]

    def _next(self, line: list[Video]) -> list[Video]:
        raise NotImplementedError

    def _running(self) -> dict[str, int]:
        """Engine rows of the videos that will be in the call after the next."""
        rows = {row.job_id: row.rows for row in self.rows if row.steps_left > 1}
        return rows | {one.job_id: one.rows for one in self._coming.values()}


class EqualKeys(_FirstInFirstOut[Row]):
    def next_batch(self) -> list[Row]:
        batch: list[Row] = []
        for row in self.rows:
            fits = sum(one.rows for one in batch) + row.rows <= self.max_rows
            if fits and self._key(row.job_id) == self._key((batch or [row])[0].job_id):
                batch.append(row)
        return batch

    def _next(self, line: list[Video]) -> list[Video]:
        running = self._running()
        chosen: list[Video] = []
        for job in line:
            first = next(iter(running), job.job_id)
            if self._key(job.job_id) != self._key(first) or sum(running.values()) + job.rows > self.max_rows:
                break
            running[job.job_id] = job.rows
            chosen.append(job)
        return chosen

    def _key(self, job_id: str) -> tuple[object, ...]:
        one, _ = self._known[job_id]
        shape = one.width, one.height, one.num_frames, one.fps
        return *shape, one.guidance, one.guidance_scale, one.image_guidance_scale


class RequestBatches(_FirstInFirstOut[Row]):
    def __init__(self, max_rows: int, requests: Requests, **settings: Any) -> None:
        super().__init__(max_rows, requests, **settings)
        self._batches: list[list[str]] = []

    def next_batch(self) -> list[Row]:
        seated = {row.job_id: row for row in self.rows}
        self._batches = [batch for batch in self._batches if any(id in seated or id in self._coming for id in batch)]
        if not self._batches or any(job_id in self._coming for job_id in self._batches[0]):
            return []
        return [seated[job_id] for job_id in self._batches[0] if job_id in seated]

    def _next(self, line: list[Video]) -> list[Video]:
        if self._running() or not line:
            return []
        chosen = line[:1]
        for job in line[1:]:
            if sum(one.rows for one in chosen) + job.rows <= self.max_rows and self._alike(line[0], job):
                chosen.append(job)
        self._batches.append([job.job_id for job in chosen])
        return chosen

    def _alike(self, head: Video, other: Video) -> bool:
        (one, has_image), (two, other_has) = self._known[head.job_id], self._known[other.job_id]
        if has_image or other_has:
            return False
        return one == two.model_copy(update={"prompt": one.prompt, "seed": one.seed})
