import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.serving.jobs import MAX_ATTEMPTS, Job, JobNotFound, JobStore, QueueFull, new_owner
from infra.serving.limits import VideoRequest

REQUEST = VideoRequest(
    prompt="a red circle",
    width=32,
    height=32,
    num_frames=8,
    fps=8,
    num_inference_steps=4,
    guidance_scale=3.0,
    flow_shift=1.0,
    seed=7,
)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    yield store
    store.close()


def create(jobs: JobStore, *, max_queued: int = 100) -> Job:
    return jobs.create(REQUEST, model="stiv-tiny", image_digest=None, max_queued=max_queued)


def test_a_created_job_is_found_by_another_process_with_its_request(jobs: JobStore, tmp_path: Path) -> None:
    job = create(jobs)
    other = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    found = other.get(job.id)
    other.close()
    assert (found.state, found.progress, found.request) == ("queued", 0, REQUEST)


def test_jobs_are_leased_in_the_order_of_their_creation_and_once(jobs: JobStore) -> None:
    created = [create(jobs).id for _ in range(4)]
    first, second = new_owner(), new_owner()
    assert [job.id for job in jobs.lease(first, 3)] == created[:3]
    assert [job.id for job in jobs.lease(second, 3)] == created[3:]
    assert jobs.lease(first, 3) == []
    assert jobs.held(first) == set(created[:3])


def test_many_threads_lease_every_job_exactly_once(jobs: JobStore) -> None:
    created = {create(jobs).id for _ in range(30)}
    taken: list[str] = []

    def take() -> None:
        owner = new_owner()
        while leased := jobs.lease(owner, 2):
            taken.extend(job.id for job in leased)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(created)


def test_a_full_queue_refuses_even_when_many_ask_at_once(jobs: JobStore) -> None:
    refused: list[QueueFull] = []

    def ask() -> None:
        try:
            create(jobs, max_queued=5)
        except QueueFull as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (jobs.count("queued"), len(refused)) == (5, 7)


def test_a_completed_job_has_its_artifacts_and_an_expiry(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    jobs.lease(owner, 1)
    jobs.heartbeat(owner, {job.id: 50})
    assert jobs.get(job.id).progress == 50
    assert jobs.complete(job.id, owner, {"video": "digest"}, retention_s=60)
    done = jobs.get(job.id)
    assert (done.state, done.progress, done.artifacts, done.owner) == ("completed", 100, {"video": "digest"}, None)
    assert done.completed_at is not None
    assert done.expires_at == done.completed_at + 60


def test_who_lost_a_job_cannot_end_it(jobs: JobStore) -> None:
    job, late, owner = create(jobs), new_owner(), new_owner()
    jobs.lease(late, 1)
    assert jobs.requeue_abandoned(lease_s=-1) == 1
    jobs.lease(owner, 1)
    assert not jobs.complete(job.id, late, {"video": "late"}, retention_s=60)
    assert not jobs.fail(job.id, late, code="late", message="late")
    jobs.heartbeat(late, {job.id: 99})
    assert jobs.get(job.id).progress == 0
    assert jobs.complete(job.id, owner, {"video": "own"}, retention_s=60)


def test_a_deleted_job_is_gone_for_all_and_its_content_forgotten(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    jobs.lease(owner, 1)
    jobs.delete(job.id)
    assert jobs.held(owner) == set()
    assert not jobs.complete(job.id, owner, {"video": "digest"}, retention_s=60)
    with pytest.raises(JobNotFound):
        jobs.get(job.id)
    with pytest.raises(JobNotFound):
        jobs.delete(job.id)
    with jobs.engine.connect() as connection:
        assert "red circle" not in str(connection.exec_driver_sql("select * from video_jobs").all())


def test_pages_follow_creation_and_survive_deletion_of_the_cursor(jobs: JobStore) -> None:
    ids = [create(jobs).id for _ in range(5)]
    page = jobs.page(after=None, limit=2, order="desc")
    assert ([job.id for job in page.jobs], page.has_more) == ([ids[4], ids[3]], True)
    jobs.delete(ids[3])
    page = jobs.page(after=ids[3], limit=3, order="desc")
    assert ([job.id for job in page.jobs], page.has_more) == ([ids[2], ids[1], ids[0]], False)
    assert [job.id for job in jobs.page(after=ids[0], limit=9, order="asc").jobs] == [ids[1], ids[2], ids[4]]
    with pytest.raises(JobNotFound):
        jobs.page(after="video_none", limit=2, order="asc")


def test_a_job_is_queued_again_when_its_lease_ran_out_and_keeps_its_seed(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    jobs.lease(owner, 1)
    assert jobs.requeue_abandoned(lease_s=60) == 0
    time.sleep(0.02)
    assert jobs.requeue_abandoned(lease_s=0.01) == 1
    again = jobs.get(job.id)
    assert (again.state, again.attempts, again.request.seed) == ("queued", 1, 7)


def test_a_dead_process_loses_its_jobs_at_once(jobs: JobStore, tmp_path: Path) -> None:
    job = create(jobs)
    script = (
        "import sys; from infra.serving.jobs import JobStore, new_owner; "
        "print(len(JobStore(sys.argv[1]).lease(new_owner(), 1)))"
    )
    url = f"sqlite:///{tmp_path}/jobs.db"
    done = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert jobs.get(job.id).state == "in_progress"
    assert jobs.requeue_abandoned(lease_s=3600) == 1


def test_an_earlier_life_of_our_own_pid_is_dead(jobs: JobStore) -> None:
    create(jobs)
    host, _, _, _ = new_owner().split("/")
    jobs.lease(f"{host}/{os.getpid()}/otherlife/0", 1)
    assert jobs.requeue_abandoned(lease_s=3600) == 1


def test_a_process_on_another_host_keeps_its_jobs_until_the_lease_ends(jobs: JobStore) -> None:
    create(jobs)
    jobs.lease("elsewhere/999999999/token/0", 1)
    assert jobs.requeue_abandoned(lease_s=3600) == 0
    assert jobs.requeue_abandoned(lease_s=-1) == 1


def test_a_job_that_outlives_too_many_workers_fails(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    for _ in range(MAX_ATTEMPTS):
        assert len(jobs.lease(owner, 1)) == 1
        jobs.requeue_abandoned(lease_s=-1)
    failed = jobs.get(job.id)
    assert (failed.state, failed.error_code) == ("failed", "worker_lost")


def test_a_released_job_counts_no_attempt(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    jobs.lease(owner, 1)
    assert jobs.release(owner) == 1
    assert (jobs.get(job.id).state, jobs.get(job.id).attempts) == ("queued", 0)
