"""One test body over SQLite and a real PostgreSQL."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import text

from infra.serving.jobs import database
from infra.serving.jobs.database import Database, SchemaMismatch
from infra.serving.jobs.owner import new_owner
from infra.serving.jobs.store import IdempotencyConflict, JobNotFound, JobStore, QueueFull, QuotaExceeded
from infra.serving.jobs.table import Beat, Job, KeptLatents, NewJob
from infra.serving.limits import ENGINE_ROWS, VideoRequest
from model.sampler import PASSES

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
KEPT = KeptLatents(engine="e" * 64, step=2, data=b"latents")


@pytest.fixture
def jobs(database_url: str) -> Iterator[JobStore]:
    store = JobStore(database_url)
    yield store
    store.close()


def create(jobs: JobStore, *, max_queued: int = 100, max_active: int | None = None, **values: object) -> Job:
    new = NewJob(**{"request": REQUEST, "model": "stiv-tiny", "inputs": {}, **values})  # pyright: ignore[reportArgumentType]
    return jobs.create(new, max_queued=max_queued, max_active=max_active)


def lease(jobs: JobStore, owner: str, limit: int = 1) -> list[str]:
    return [job.id for job in jobs.lease(owner, [job.job_id for job in jobs.waiting(limit)])]


def complete(jobs: JobStore, job: Job, owner: str) -> bool:
    return jobs.complete(job.id, owner, {"video": "0" * 64}, engine="e" * 64, retention_s=60)


def in_threads(count: int, work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_created_job_is_found_by_another_replica_with_its_request(jobs: JobStore, database_url: str) -> None:
    job = create(jobs, inputs={"image": "1" * 64}, client="key-1", priority=3, deadline_at=9.0)
    other = JobStore(database_url)
    found = other.get(job.id)
    other.close()
    assert (found.state, found.progress, found.request) == ("queued", 0, REQUEST)
    assert (found.inputs, found.client, found.priority, found.deadline_at) == ({"image": "1" * 64}, "key-1", 3, 9.0)


def test_what_waits_is_said_with_what_it_will_cost(jobs: JobStore) -> None:
    first = create(jobs, request=REQUEST.model_copy(update={"guidance": "none"}))
    urgent = create(jobs, priority=5, client="key-1")
    found = jobs.waiting(9)
    assert [(job.job_id, job.priority, job.client) for job in found] == [(urgent.id, 5, "key-1"), (first.id, 0, "")]
    assert [(job.rows, job.steps_left, job.cost_key) for job in found] == [(2, 4, "8x32x32"), (1, 4, "8x32x32")]
    assert {kind: len(passes) for kind, passes in PASSES.items()} == ENGINE_ROWS


def test_jobs_are_leased_in_the_order_asked_for_and_once(jobs: JobStore) -> None:
    created = [create(jobs).id for _ in range(4)]
    first, second = new_owner(), new_owner()
    asked = [created[2], created[0], created[3]]
    assert [job.id for job in jobs.lease(first, asked)] == asked
    assert [job.id for job in jobs.lease(second, created)] == [created[1]]
    assert jobs.lease(first, created) == []
    assert jobs.held(first) == set(asked)


def test_many_threads_lease_every_job_exactly_once(jobs: JobStore) -> None:
    created = {create(jobs).id for _ in range(20)}
    taken: list[str] = []

    def take() -> None:
        owner = new_owner()
        while jobs.count("queued"):
            taken.extend(lease(jobs, owner, 3))

    in_threads(4, take)
    assert sorted(taken) == sorted(created)


def test_a_full_queue_refuses_even_when_many_ask_at_once(jobs: JobStore) -> None:
    refused: list[QueueFull] = []

    def ask() -> None:
        try:
            create(jobs, max_queued=5)
        except QueueFull as error:
            refused.append(error)

    in_threads(12, ask)
    assert (jobs.count("queued"), len(refused)) == (5, 7)


def test_a_client_has_no_more_jobs_than_its_quota(jobs: JobStore) -> None:
    owner = new_owner()
    running = create(jobs, client="key-1", max_active=2)
    lease(jobs, owner)
    create(jobs, client="key-1", max_active=2)
    with pytest.raises(QuotaExceeded, match="2 videos"):
        create(jobs, client="key-1", max_active=2)
    create(jobs, client="key-2", max_active=2)
    complete(jobs, running, owner)
    create(jobs, client="key-1", max_active=2)


def test_the_same_idempotency_key_makes_one_job_even_when_sent_at_once(jobs: JobStore) -> None:
    made: list[str] = []
    once: dict[str, Any] = {"idempotency_key": "k", "request_digest": "d", "client": "key-1"}
    in_threads(6, lambda: made.append(create(jobs, max_queued=1, **once).id))
    assert (len(made), len(set(made)), jobs.count("queued")) == (6, 1, 1)
    with pytest.raises(IdempotencyConflict, match=made[0]):
        create(jobs, **{**once, "request_digest": "other"})
    assert create(jobs, **{**once, "client": "key-2"}).id != made[0]
    jobs.delete(made[0])
    assert create(jobs, **once).id != made[0]


def test_a_completed_job_has_its_artifacts_its_engine_and_an_expiry(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    lease(jobs, owner)
    jobs.heartbeat(owner, {job.id: Beat(50, estimated_done_at=12.5, preview=b"webp")})
    running = jobs.get(job.id)
    assert (running.progress, running.estimated_done_at, jobs.preview(job.id)) == (50, 12.5, b"webp")
    jobs.heartbeat(owner, {job.id: Beat(60)})
    assert jobs.preview(job.id) == b"webp"
    assert complete(jobs, job, owner)
    done = jobs.get(job.id)
    assert (done.state, done.progress, done.artifacts, done.owner) == ("completed", 100, {"video": "0" * 64}, None)
    assert done.engine == "e" * 64
    assert done.completed_at is not None
    assert done.expires_at == done.completed_at + 60


def test_who_lost_a_job_cannot_end_it(jobs: JobStore) -> None:
    job, late, owner = create(jobs), new_owner(), new_owner()
    lease(jobs, late)
    assert jobs.requeue_abandoned(lease_s=-1) == 1
    lease(jobs, owner)
    assert not complete(jobs, job, late)
    assert not jobs.fail(job.id, late, code="late", message="late")
    jobs.heartbeat(late, {job.id: Beat(99)})
    jobs.keep_latents(late, {job.id: KEPT})
    assert (jobs.get(job.id).progress, jobs.latents(job.id)) == (0, None)
    assert complete(jobs, job, owner)


def test_a_deleted_job_is_gone_for_all_and_its_content_forgotten(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    lease(jobs, owner)
    jobs.heartbeat(owner, {job.id: Beat(50, preview=b"webp")})
    jobs.keep_latents(owner, {job.id: KEPT})
    jobs.delete(job.id)
    assert jobs.held(owner) == set()
    assert not complete(jobs, job, owner)
    with pytest.raises(JobNotFound):
        jobs.get(job.id)
    with pytest.raises(JobNotFound):
        jobs.delete(job.id)
    with jobs.database.read() as session:
        left = str(session.execute(text("select * from video_jobs")).all())
        assert "red circle" not in left and "webp" not in left
        assert session.execute(text("select * from video_latents")).all() == []


def test_pages_follow_creation_and_survive_deletion_of_the_cursor(jobs: JobStore) -> None:
    ids = [create(jobs, client=f"key-{number % 2}").id for number in range(5)]
    page = jobs.page(after=None, limit=2, order="desc")
    assert ([job.id for job in page.jobs], page.has_more) == ([ids[4], ids[3]], True)
    jobs.delete(ids[3])
    page = jobs.page(after=ids[3], limit=3, order="desc")
    assert ([job.id for job in page.jobs], page.has_more) == ([ids[2], ids[1], ids[0]], False)
    assert [job.id for job in jobs.page(after=ids[0], limit=9, order="asc").jobs] == [ids[1], ids[2], ids[4]]
    with pytest.raises(JobNotFound):
        jobs.page(after="video_none", limit=2, order="asc")
    mine = jobs.page(after=ids[0], limit=9, order="asc", client="key-0")
    assert [job.id for job in mine.jobs] == [ids[2], ids[4]]
    with pytest.raises(JobNotFound):
        jobs.page(after=ids[1], limit=9, order="asc", client="key-0")


def test_a_job_is_queued_again_when_its_lease_ran_out_and_keeps_its_seed(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    lease(jobs, owner)
    assert jobs.requeue_abandoned(lease_s=60) == 0
    time.sleep(0.02)
    assert jobs.requeue_abandoned(lease_s=0.01) == 1
    again = jobs.get(job.id)
    assert (again.state, again.attempts, again.request.seed) == ("queued", 1, 7)


def test_kept_latents_outlive_the_worker_and_not_the_job(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    lease(jobs, owner)
    jobs.keep_latents(owner, {job.id: KeptLatents("e" * 64, 1, b"early")})
    jobs.keep_latents(owner, {job.id: KEPT})
    jobs.requeue_abandoned(lease_s=-1)
    assert [waiting.steps_left for waiting in jobs.waiting(1)] == [2]
    assert (jobs.get(job.id).progress, jobs.latents(job.id)) == (50, KEPT)
    second = new_owner()
    lease(jobs, second)
    assert complete(jobs, job, second)
    assert jobs.latents(job.id) is None


def test_a_killed_process_loses_its_jobs_at_once(jobs: JobStore) -> None:
    create(jobs)
    host, namespace, _, _, token = new_owner().split("/")
    with subprocess.Popen(["sleep", "60"]) as process:
        started = round(psutil.Process(process.pid).create_time() * 1000)
        lease(jobs, f"{host}/{namespace}/{process.pid}/{started}/{token}")
        assert jobs.requeue_abandoned(lease_s=3600) == 0
        process.kill()
    assert jobs.requeue_abandoned(lease_s=3600) == 1


def test_an_earlier_life_of_our_own_pid_is_dead(jobs: JobStore) -> None:
    create(jobs)
    host, namespace, pid, _, _ = new_owner().split("/")
    assert int(pid) == os.getpid()
    lease(jobs, f"{host}/{namespace}/{pid}/1/0")
    assert jobs.requeue_abandoned(lease_s=3600) == 1


@pytest.mark.parametrize("part", [0, 1], ids=["on another host", "in another container of this host"])
def test_a_process_elsewhere_keeps_its_jobs_until_the_lease_ends(jobs: JobStore, part: int) -> None:
    create(jobs)
    parts = new_owner().split("/")
    parts[2] = "999999999"
    parts[part] = "elsewhere"
    lease(jobs, "/".join(parts))
    assert jobs.requeue_abandoned(lease_s=3600) == 0
    assert jobs.requeue_abandoned(lease_s=-1) == 1


def test_a_job_that_outlives_too_many_workers_at_one_place_fails(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    for _ in range(2):
        lease(jobs, owner)
        jobs.requeue_abandoned(lease_s=-1)
    lease(jobs, owner)
    jobs.keep_latents(owner, {job.id: KEPT})  # it came forward, so its losses count anew
    for _ in range(3):
        assert jobs.requeue_abandoned(lease_s=-1) == 1
        lease(jobs, owner)
    failed = jobs.get(job.id)
    assert (failed.state, failed.error_code, failed.attempts) == ("failed", "worker_lost", 5)


def test_a_released_job_counts_no_attempt(jobs: JobStore) -> None:
    job, owner = create(jobs), new_owner()
    lease(jobs, owner)
    assert jobs.release(owner) == 1
    assert (jobs.get(job.id).state, jobs.get(job.id).attempts) == ("queued", 0)


def test_the_end_of_a_job_enters_the_outbox_with_the_job(database_url: str) -> None:
    jobs, owner = JobStore(database_url, notifies=True, max_losses=1), new_owner()
    done, failed, lost, deleted = (create(jobs) for _ in range(4))
    lease(jobs, owner, 4)
    complete(jobs, done, owner)
    jobs.fail(failed.id, owner, code="bad", message="bad")
    jobs.delete(deleted.id)
    assert [job.id for job in jobs.lease_notifications(9, lease_s=60)] == [done.id, failed.id]
    assert jobs.lease_notifications(9, lease_s=60) == []
    jobs.requeue_abandoned(lease_s=-1)
    assert [(job.id, job.error_code) for job in jobs.lease_notifications(9, lease_s=60)] == [(lost.id, "worker_lost")]
    jobs.notified(done.id)
    jobs.notify_later(failed.id, at=time.time() - 1)
    assert [(job.id, job.notify_attempts) for job in jobs.lease_notifications(9, lease_s=60)] == [(failed.id, 2)]
    jobs.close()


def test_what_a_replica_says_is_read_by_all_while_it_is_fresh(jobs: JobStore) -> None:
    jobs.publish_state("a", {"seconds": 1})
    jobs.publish_state("b", {"seconds": 3})
    jobs.publish_state("a", {"seconds": 2})
    assert jobs.states(60) == [{"seconds": 2}, {"seconds": 3}]
    assert jobs.states(-1) == []


def test_ended_jobs_are_forgotten_after_a_time(jobs: JobStore) -> None:
    ended, standing, owner = create(jobs), create(jobs), new_owner()
    lease(jobs, owner)
    jobs.fail(ended.id, owner, code="bad", message="bad")
    assert jobs.forget(ended_before=time.time() - 60) == 0
    assert jobs.forget(ended_before=time.time() + 1) == 1
    with pytest.raises(JobNotFound):
        jobs.get(ended.id)
    assert [job.id for job in jobs.page(after=None, limit=9, order="asc").jobs] == [standing.id]


def test_many_replicas_that_start_at_once_make_one_schema(database_url: str) -> None:
    made: list[JobStore] = []
    in_threads(6, lambda: made.append(JobStore(database_url)))
    assert len(made) == 6
    job = create(made[0])
    assert {store.get(job.id).id for store in made} == {job.id}
    for store in made:
        store.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("update video_schema set version = 7", "version 7, this server works with 1: serve it with the release"),
        ("delete from video_schema", "version none"),
    ],
)
def test_tables_of_another_version_are_refused(jobs: JobStore, database_url: str, change: str, message: str) -> None:
    with jobs.database.write() as session:
        session.execute(text(change))
    with pytest.raises(SchemaMismatch, match=message):
        JobStore(database_url)


def test_older_tables_are_refused_until_they_are_migrated(
    jobs: JobStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create(jobs)
    jobs.close()
    monkeypatch.setattr(database, "VERSION", 2)
    added = text("alter table video_jobs add column added integer default 5")
    monkeypatch.setattr(database, "MIGRATIONS", [lambda connection: connection.execute(added)])
    with pytest.raises(SchemaMismatch, match=r"version 1, this server works with 2: .* run `stiv migrate-jobs`"):
        Database(database_url)
    Database(database_url, migrating=True).close()
    migrated = Database(database_url)
    with migrated.read() as session:
        assert session.execute(text("select id, added from video_jobs")).all() == [(job.id, 5)]
    migrated.close()


@pytest.mark.parametrize("url", ["sqlite://", "mysql://somewhere/jobs"])
def test_a_database_that_keeps_nothing_or_is_not_known_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"sqlite:///"):
        JobStore(url)


def test_what_is_committed_is_on_disk(jobs: JobStore) -> None:
    with jobs.database.read() as session:
        if jobs.database.is_sqlite:
            found = [session.scalar(text(f"pragma {name}")) for name in ("journal_mode", "synchronous")]
            assert found == ["wal", 2]
        else:
            found = [session.scalar(text(f"show {name}")) for name in ("synchronous_commit", "fsync")]
            assert found == ["on", "on"]


def test_a_database_out_of_reach_is_noticed(tmp_path: Path) -> None:
    jobs = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    assert jobs.is_reachable()
    with jobs.database.write() as session:
        session.execute(text("drop table video_latents"))
        session.execute(text("drop table video_jobs"))
    assert not jobs.is_reachable()
    jobs.close()


def test_a_canary_makes_its_own_videos_and_stable_takes_over_what_it_cannot(database_url: str) -> None:
    stable, canary = JobStore(database_url), JobStore(database_url, track="canary")
    try:
        ours = [create(canary).id for _ in range(4)]
        theirs = create(stable).id
        assert {job.job_id for job in canary.waiting(9)} == set(ours) and [job.job_id for job in stable.waiting(9)] == [
            theirs
        ]

        assert len(canary.lease("canary-worker", ours[:3])) == 3
        assert canary.hand_over(ours[0], "canary-worker") and not canary.hand_over(ours[0], "canary-worker")
        assert canary.complete(ours[1], "canary-worker", {}, engine="e", retention_s=60)
        assert canary.get(ours[1]).track == "canary"
        assert canary.release("canary-worker") == 1
        assert [job.job_id for job in stable.waiting(9)] == [ours[0], ours[2], theirs], (
            "in the order they were asked for"
        )

        assert stable.hand_over_waiting(older_than_s=60) == 0, "a canary gets time to take its jobs"
        assert canary.hand_over_waiting() == 1
        assert len(stable.waiting(9)) == 4 and not canary.waiting(9)
    finally:
        stable.close()
        canary.close()
