import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.store import JobStore
from infra.serving.jobs.table import Job, NewJob
from infra.serving.limits import VideoRequest
from infra.serving.pipeline import VideoPipeline
from infra.serving.worker import Worker
from infra.store.folder import FolderStore
from tests.tiny_server import image, request, tiny_pipeline, tiny_settings


@pytest.fixture(scope="module")
def pipeline() -> VideoPipeline:
    return tiny_pipeline()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    yield store
    store.close()


@pytest.fixture
def worker(jobs: JobStore, pipeline: VideoPipeline, tmp_path: Path) -> Worker:
    """Not started: tests take its turns themselves."""
    settings = tiny_settings(tmp_path, max_rows=3, progress_every_s=0, drain_s=120)
    return Worker(jobs, pipeline, JobFiles(jobs.database, FolderStore(tmp_path / "store")), settings)


@pytest.fixture
def create(jobs: JobStore) -> Callable[..., Job]:
    def create(body: VideoRequest | None = None, *, image_digest: str | None = None) -> Job:
        inputs = {"image": image_digest} if image_digest else {}
        return jobs.create(NewJob(body or request(), model="stiv-tiny", inputs=inputs), max_queued=99)

    return create


def put(worker: Worker, data: bytes) -> str:
    return worker.files.keep_bytes(data)


def read(worker: Worker, digest: str) -> bytes:
    return worker.files.read(digest)


def finish(worker: Worker) -> None:
    while worker.turn():
        pass


def test_a_job_joins_at_the_next_step_and_leaves_at_its_last(
    worker: Worker, jobs: JobStore, create: Callable[..., Job]
) -> None:
    long = create(request(num_inference_steps=5))
    worker.turn()
    short = create(request(num_inference_steps=2, guidance_scale=7.0))
    worker.turn()
    assert {row.job_id: row.step for row in worker.scheduler.rows} == {long.id: 2, short.id: 1}
    worker.turn()
    assert (jobs.get(short.id).state, jobs.get(long.id).state) == ("completed", "in_progress")
    finish(worker)
    assert jobs.get(long.id).state == "completed"


def test_no_more_rows_run_than_there_are_seats(worker: Worker, jobs: JobStore, create: Callable[..., Job]) -> None:
    created = [create() for _ in range(5)]
    worker.turn()
    assert sorted(jobs.get(job.id).state for job in created) == ["in_progress"] * 3 + ["queued"] * 2
    finish(worker)
    assert {jobs.get(job.id).state for job in created} == {"completed"}


def test_a_video_made_in_company_is_the_video_made_alone(
    worker: Worker, jobs: JobStore, create: Callable[..., Job], tmp_path: Path
) -> None:
    digest = put(worker, image())
    alone = create(request(seed=3), image_digest=digest)
    finish(worker)
    company = [create(request(seed=4)), create(request(seed=3), image_digest=digest), create(request("blue", seed=5))]
    finish(worker)
    twin = jobs.get(company[1].id)
    videos = [read(worker, job.artifacts["video"]) for job in (jobs.get(alone.id), twin)]
    assert videos[0] == videos[1]
    assert jobs.get(company[0].id).artifacts["video"] != twin.artifacts["video"]


def test_a_row_that_diverges_fails_alone(worker: Worker, jobs: JobStore, create: Callable[..., Job]) -> None:
    good, bad = create(), create(request("NAN"))
    finish(worker)
    assert jobs.get(good.id).state == "completed"
    failed = jobs.get(bad.id)
    assert (failed.state, failed.error_code) == ("failed", "generation_diverged")
    assert "guidance_scale" in (failed.error_message or "")


def test_a_row_that_breaks_the_engine_call_fails_alone(
    worker: Worker, jobs: JobStore, create: Callable[..., Job]
) -> None:
    good, bad, other = create(), create(request("EXPLODE")), create(request(seed=1))
    finish(worker)
    assert [jobs.get(job.id).state for job in (good, bad, other)] == ["completed", "failed", "completed"]
    assert jobs.get(bad.id).error_code == "internal_error"
    assert "mat1" not in (jobs.get(bad.id).error_message or "")


def test_a_lost_or_corrupt_image_fails_its_job_alone(
    worker: Worker, jobs: JobStore, create: Callable[..., Job], tmp_path: Path
) -> None:
    lost = create(image_digest="0" * 64)
    digest = put(worker, image())
    blob = tmp_path / "store" / "cas" / "sha256" / digest[:2] / digest
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    corrupt, good = create(image_digest=digest), create()
    finish(worker)
    assert [jobs.get(job.id).state for job in (lost, corrupt, good)] == ["failed", "failed", "completed"]


def test_a_cancelled_job_leaves_before_the_next_step(
    worker: Worker, jobs: JobStore, create: Callable[..., Job]
) -> None:
    cancelled, other = create(request(num_inference_steps=50)), create()
    worker.turn()
    jobs.delete(cancelled.id)
    worker.turn()
    assert [row.job_id for row in worker.scheduler.rows] == [other.id]
    finish(worker)
    assert jobs.get(other.id).state == "completed"


def test_a_job_cancelled_while_it_is_delivered_stays_deleted(
    worker: Worker, jobs: JobStore, create: Callable[..., Job]
) -> None:
    job = create(request(num_inference_steps=1))
    worker.turn(admitting=False)
    leased = jobs.lease(worker.owner, [job.id])[0]
    row = worker.pipeline.prepare(job.id, leased.request, {})
    worker.pipeline.advance([row])
    jobs.delete(job.id)
    assert not jobs.complete(job.id, worker.owner, {"video": "x"}, engine="e", retention_s=1)
    finish(worker)
    assert jobs.count("deleted") == 1


def test_a_second_run_of_a_lost_job_gives_the_same_video(
    worker: Worker, jobs: JobStore, pipeline: VideoPipeline, create: Callable[..., Job], tmp_path: Path
) -> None:
    twin, job = create(), create()
    worker.turn()
    assert jobs.requeue_abandoned(lease_s=-1) == 2
    finish(worker)
    second = Worker(jobs, pipeline, worker.files, worker.settings)
    finish(second)
    states = [jobs.get(each.id) for each in (twin, job)]
    assert [each.state for each in states] == ["completed", "completed"]
    assert states[0].artifacts["video"] == states[1].artifacts["video"]


def test_progress_is_told_and_never_says_done_before_it_is(
    worker: Worker, jobs: JobStore, create: Callable[..., Job]
) -> None:
    job, seen = create(request(num_inference_steps=4)), []
    while worker.turn():
        seen.append(jobs.get(job.id).progress)
    assert seen == [25, 50, 75, 100]


def test_a_stopping_worker_finishes_what_runs_and_leaves_the_queue(
    worker: Worker, jobs: JobStore, create: Callable[..., Job]
) -> None:
    created = [create(request(num_inference_steps=20)) for _ in range(4)]
    worker.start()
    while jobs.count("in_progress") < 3:
        time.sleep(0.005)
    worker.stop()
    assert not worker.is_alive
    assert sorted(jobs.get(job.id).state for job in created) == ["completed"] * 3 + ["queued"]


def test_a_worker_without_time_to_drain_hands_its_jobs_back(
    jobs: JobStore, pipeline: VideoPipeline, create: Callable[..., Job], tmp_path: Path
) -> None:
    job = create(request(num_inference_steps=200))
    worker = Worker(
        jobs, pipeline, JobFiles(jobs.database, FolderStore(tmp_path / "store")), tiny_settings(tmp_path, drain_s=0)
    )
    worker.start()
    while jobs.count("in_progress") < 1:
        time.sleep(0.005)
    worker.stop()
    assert (jobs.get(job.id).state, jobs.get(job.id).attempts) == ("queued", 0)
